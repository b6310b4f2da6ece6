# Solves with py-rattler over repodata that was fetched before: no network.
# A request on standard input, {"packages": [...]} or {"error": ..., "kind": ...}
# in the file that is named by the first argument.
import asyncio
import datetime
import json
import os
import sys

sys.path.insert(0, "/mnt/rattler")
import rattler  # noqa: E402


def solve(q):
    repodata = [rattler.SparseRepoData(rattler.Channel(r["channel"]), r["subdir"], r["path"]) for r in q["repodata"]]
    locked = []
    for want in q["locked"]:  # preferred where they still fit
        for at, data in zip(q["repodata"], repodata):
            if want["url"].startswith(at["channel"] + "/" + at["subdir"] + "/"):
                locked += [r for r in data.load_records(rattler.PackageName(want["name"])) if r.url == want["url"]]
    more = {}
    if q["exclude_newer"]:
        when = datetime.datetime.fromisoformat(q["exclude_newer"].replace("Z", "+00:00"))
        more["exclude_newer"] = when if when.tzinfo else when.replace(tzinfo=datetime.timezone.utc)
        more["timestamp_policy"] = "allow-missing"
    return asyncio.run(
        rattler.solve_with_sparse_repodata(
            specs=q["specs"],
            sparse_repodata=repodata,
            locked_packages=locked,
            virtual_packages=rattler.VirtualPackage.detect(rattler.VirtualPackageOverrides.from_env()),
            channel_priority=rattler.ChannelPriority.Disabled if q["any_channel"] else rattler.ChannelPriority.Strict,
            **more,
        )
    )


def main():
    q = json.load(sys.stdin)
    try:
        if q["alias"]:
            answer = {"alias": rattler.Channel("x").base_url.rstrip("/")[:-2]}
        else:
            answer = {"packages": [json.loads(r.to_json()) for r in solve(q)]}
    except Exception as e:
        answer = {"error": str(e), "kind": type(e).__name__}
    with open(sys.argv[1], "w") as f:
        json.dump(answer, f)
    # Not by the interpreter's end: threads of the runtime below are still there
    # and crash in it now and then (SIGSEGV).
    os._exit(0)


main()
