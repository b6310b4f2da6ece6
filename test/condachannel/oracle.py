"""What rattler does with a channel: a request in argv[1] as JSON, an answer on standard output as JSON.

channel, specs       what is solved for
lock                 where to write a pixi.lock
explicit             where to write an @EXPLICIT list
root, prefix         where to install, and for which path
records              a folder of prefix records to read
"""
import asyncio, json, os, sys, tempfile, time
from rattler import Channel, PrefixRecord, VirtualPackage, install, solve
from rattler.lock import LockFile, LockChannel, LockPlatform

ask = json.loads(sys.argv[1])


async def main():
    out = {}
    if ask.get("records"):
        out["records"] = {}
        for f in sorted(os.listdir(ask["records"])):
            if f.endswith(".json"):
                r = PrefixRecord.from_path(os.path.join(ask["records"], f))
                out["records"][f] = {"name": r.name.normalized, "version": str(r.version), "build": str(r.build),
                                     "files": [str(p) for p in r.files], "paths": len(r.paths_data.paths), "url": r.url}
        return out
    with open(os.path.join(ask["channel"], "channel.json")) as f:
        here = json.load(f)["platform"]
    channel = Channel("file://" + ask["channel"])
    records = await solve([channel], ask["specs"], platforms=[here, "noarch"], virtual_packages=VirtualPackage.detect())
    out["packages"] = [os.path.basename(str(r.file_name)) for r in records]
    if ask.get("lock"):
        p = LockPlatform(here)
        lock = LockFile([p])
        lock.set_channels("default", [LockChannel("file://" + ask["channel"])])
        for r in records:
            lock.add_conda_package("default", p, r)
        lock.to_path(ask["lock"])
    if ask.get("explicit"):
        with open(ask["explicit"], "w") as f:
            f.write("# platform: %s\n@EXPLICIT\n" % here)
            for r in records:
                f.write("%s#sha256:%s\n" % (r.url, r.sha256.hex()))
    if ask.get("root"):
        with tempfile.TemporaryDirectory() as cache:
            t = time.monotonic()
            for _ in range(ask.get("times", 1)):
                root = ask["root"]
                if ask.get("times"):
                    root = tempfile.mkdtemp(dir=ask["root"])
                await install(records, target_prefix=root, cache_dir=tempfile.mkdtemp(dir=cache), execute_link_scripts=False,
                              show_progress=False, alternative_target_prefix=ask["prefix"])
            out["seconds"] = time.monotonic() - t
    return out


print(json.dumps(asyncio.run(main())), flush=True)
os._exit(0)  # the threads of its runtime crash now and then when the interpreter ends
