"""Builds a conda channel of real packages into argv[1], for the machine it runs on."""
import asyncio, hashlib, json, os, platform, subprocess, sys, tempfile
from conda_package_handling import api
from rattler.index import index_fs

OUT = sys.argv[1]
PYTHON = os.path.realpath("/usr/bin/python3")  # the one a sandbox's base shows
PY = subprocess.check_output([PYTHON, "-c", "import platform; print(platform.python_version())"], text=True).strip()
MM = ".".join(PY.split(".")[:2])
ARCH = {"x86_64": "linux-64", "aarch64": "linux-aarch64"}[platform.machine()]
# As conda-build makes it: long, so that whatever replaces it fits into binaries.
PREFIX = ("/home/builder/work/host_env" + "_placehold" * 30)[:255]
TIME = 1700000000


class Link(str):
    pass


class Dir:
    pass


def package(name, version, build, files, subdir=ARCH, noarch=None, depends=(), kind="conda", entry_points=(),
            old=False, unpatched=(), no_link=(), has_prefix=None):
    """files: path -> bytes, (bytes, mode), Link or Dir."""
    number = int(build.rsplit("_", 1)[-1])
    index = {"name": name, "version": version, "build": build, "build_number": number, "depends": list(depends),
             "subdir": subdir, "license": "MIT", "license_family": "MIT", "timestamp": TIME * 1000,
             "arch": None if noarch else platform.machine(), "platform": None if noarch else "linux"}
    if noarch:
        index["noarch"] = noarch
    with tempfile.TemporaryDirectory() as work:
        paths, prefixed = [], []
        for path, what in files.items():
            at = os.path.join(work, path)
            os.makedirs(os.path.dirname(at), exist_ok=True)
            entry = {"_path": path, "path_type": "hardlink"}
            if isinstance(what, Link):
                os.symlink(what, at)
                entry["path_type"] = "softlink"
                target = os.path.join(os.path.dirname(at), what)
                if os.path.isfile(target):  # conda-build hashes what a link leads to
                    data = open(target, "rb").read()
                    entry |= {"sha256": hashlib.sha256(data).hexdigest(), "size_in_bytes": len(data)}
            elif isinstance(what, Dir):
                os.makedirs(at)
                entry["path_type"] = "directory"
            else:
                data, mode = what if isinstance(what, tuple) else (what, 0o644)
                with open(at, "wb") as f:
                    f.write(data)
                os.chmod(at, mode)
                os.utime(at, (TIME, TIME))
                entry |= {"sha256": hashlib.sha256(data).hexdigest(), "size_in_bytes": len(data)}
                if PREFIX.encode() in data and path not in unpatched:
                    mode = "binary" if b"\0" in data else "text"
                    entry |= {"file_mode": mode, "prefix_placeholder": PREFIX}
                    prefixed.append(f"{PREFIX} {mode} {path}\n")
            if path in no_link:
                entry["no_link"] = True
            paths.append(entry)
        info = {"index.json": json.dumps(index, indent=2), "files": "".join(p + "\n" for p in files),
                "about.json": "{}", "hash_input.json": "{}"}
        if old:
            info["has_prefix"] = has_prefix if has_prefix is not None else "".join(prefixed)
            info["no_link"] = "".join(p + "\n" for p in no_link)
        else:
            info["paths.json"] = json.dumps({"paths": paths, "paths_version": 1})
        if noarch == "python":
            info["link.json"] = json.dumps({"noarch": {"type": "python", "entry_points": list(entry_points)},
                                            "package_metadata_version": 1})
        os.makedirs(os.path.join(work, "info"))
        names = list(files)
        for n, text in info.items():
            with open(os.path.join(work, "info", n), "w") as f:
                f.write(text)
            os.utime(os.path.join(work, "info", n), (TIME, TIME))
            names.append("info/" + n)
        where = os.path.join(OUT, subdir)
        os.makedirs(where, exist_ok=True)
        kw = {"compression_level": 3} if kind == "conda" else {}
        api.create(work, names, os.path.join(where, f"{name}-{version}-{build}.{kind}"), where, **kw)


def program(source):
    """A real binary that has the prefix in it."""
    with tempfile.TemporaryDirectory() as work:
        with open(os.path.join(work, "x.c"), "w") as f:
            f.write(source)
        subprocess.check_call(["gcc", "-O1", "-o", os.path.join(work, "x"), os.path.join(work, "x.c")])
        with open(os.path.join(work, "x"), "rb") as f:
            return f.read()


P = PREFIX
with open(PYTHON, "rb") as f:
    interpreter = f.read()
# Real enough: the system's interpreter, which finds its library by pyvenv.cfg.
package("python", PY, "h1_0", {
    f"bin/python{MM}": (interpreter, 0o755),
    "bin/python3": Link(f"python{MM}"),
    "bin/python": Link("python3"),
    "pyvenv.cfg": f"home = /usr/bin\nversion = {PY}\n".encode(),
    f"lib/python{MM}/site-packages/README.txt": b"packages\n",
})
package("hello-bin", "1.0", "h2_0", {
    "bin/hello-bin": (program(f"""#include <stdio.h>
static const char share[] = "{P}/share/hello.txt";
static const char many[] = "{P}/lib:{P}/lib64:/usr/lib";
int main(void) {{ char b[99]; FILE *f = fopen(share, "r"); if (!f || !fgets(b, 99, f)) return 3; fputs(b, stdout); puts(many); return 0; }}
"""), 0o755),
    "share/hello.txt": b"hello from the prefix\n",
    "lib/libblob.so": b"\x7fELF\0" + P.encode() + b"/a:" + P.encode() + b"/b\0tail\0" + P.encode() + b"\0" + b"x" * 33 + P.encode(),
})
TEXTS = {
    "etc/app.conf": f"root = {P}\nlib = {P}/lib:{P}/lib64\n".encode(),
    "bin/app": (f"#!{P}/bin/python{MM}\nprint('{P}')\n".encode(), 0o755),
    "bin/app.sh": (f"#!/bin/sh -e\necho {P}\n".encode(), 0o755),
    "lib/pkgconfig/app.pc": f"prefix={P}\n".encode(),
    "share/app/crlf": f"{P}\r\n{P}".encode(),
    "share/app/shebang-only": f"#!{P}/bin/tool".encode(),
    "share/app/data": b"no prefix here\n",
    "share/app/empty": b"",
    "share/app/only-read": (b"r", 0o444),
    "share/app/private": (b"p", 0o600),
}
package("text-prefix", "1.0", "h3_0", TEXTS)
package("text-twin", "1.0", "h3_1", {k.replace("app", "twin"): v for k, v in TEXTS.items()}, kind="tar.bz2")
# rattler 0.28 writes U+FFFD for the byte that is no UTF-8.
package("latin1", "1.0", "h3_0", {"share/latin1.txt": b"#!/bin/sh \xe9\n" + P.encode() + b" \xff\n"})
DEEP = "libexec/" + "/".join(["d" * 30] * 4)
package("long-shebang", "1.0", "h4_0", {
    "bin/long-python": (f"#!{P}/{DEEP}/python{MM} -E\nprint(1)\n".encode(), 0o755),
    "bin/long-perl": (f"#!{P}/{DEEP}/perl -w -T\nprint 1;\n".encode(), 0o755),
    "bin/long-space": (f"#! {P}/{DEEP}/py\\ thon -E\n".encode(), 0o755),
    "bin/long-odd": (f"#!{P}/{DEEP}/python{MM}x\n".encode(), 0o755),
})
package("greet", "1.2", "pyh5_0", {
    "site-packages/greet/__init__.py": b"def main():\n    print('hello')\n\n\nclass app:\n    @staticmethod\n    def run():\n        print('run')\n",
    "site-packages/greet/data.json": b"{}",
    "site-packages/greet/where.py": f"PREFIX = '{P}'\n".encode(),
    "site-packages/greet/template.py": b"this is {{ no }} python\n",
    "site-packages/greet-1.2.dist-info/METADATA": b"Metadata-Version: 2.1\nName: greet\nVersion: 1.2\n",
    "site-packages/greet-1.2.dist-info/RECORD": b"",
    "python-scripts/greet-script": (f"#!{P}/bin/python\nimport greet; greet.main()\n".encode(), 0o755),
    "share/greet/readme": b"read me\n",
}, subdir="noarch", noarch="python", depends=["python >=3"], entry_points=["greet = greet:main", "greet-run=greet:app.run"])
package("sounds", "2.0", "6_0", {
    "share/sounds/ping.wav": b"RIFF",
    "etc/conda/activate.d/sounds.sh": b"#!/bin/sh\nexport SOUNDS_HOME=\"${CONDA_PREFIX}/share/sounds\"\nexport PATH=\"$CONDA_PREFIX/share/sounds/bin:$PATH\"\n",
    "etc/conda/deactivate.d/sounds.sh": b"unset SOUNDS_HOME\n",
    "etc/conda/env_vars.d/sounds.json": b"{\"SOUNDS_RATE\": \"44100\"}",
}, subdir="noarch", noarch="generic")
for v in "1.0", "2.0":
    package("liblink", v, "h7_0", {
        f"lib/liblink.so.{v}": b"\x7fELF " + v.encode(), "lib/liblink.so.1": Link(f"liblink.so.{v}"), "lib/liblink.so": Link("liblink.so.1"),
        "lib64": Link("lib"), "share/link/up": Link("../../lib/liblink.so"), "share/link/dangling": Link("nowhere"),
    })
package("uselink", "1.0", "h8_0", {"bin/uselink": (b"#!/bin/sh\n", 0o755)}, depends=["liblink >=1"])
package("nolink", "1.0", "h9_0", {"etc/nolink.conf": b"x\n", "share/nolink": b"y\n"}, no_link=["etc/nolink.conf"])
CLOBBER = lambda who: {"share/clash/same": who, "share/clash/only-" + who.decode(): who}
package("clobber-a", "1.0", "h10_0", CLOBBER(b"a") | {"share/clash/prefix": P.encode()})
package("clobber-b", "1.0", "h10_0", CLOBBER(b"b") | {"share/clash/prefix": b"b " + P.encode()}, depends=["clobber-a"])
package("clobber-c", "1.0", "h10_0", CLOBBER(b"c") | {"share/clash/Same": b"other case"})
# A file against a folder: which thread of rattler 0.28 is first decides whether it fails.
package("kind-a", "1.0", "h16_0", {"share/kind/one": b"a file", "share/kind/two/x": b"ax", "share/kind/two/y": b"ay"})
package("kind-b", "1.0", "h16_0", {"share/kind/one/below": b"b below", "share/kind/two": b"b file"}, depends=["kind-a"])
package("scripted", "1.0", "h11_0", {
    "bin/.scripted-post-link.sh": (b"#!/bin/bash\necho \"$PKG_NAME $PKG_VERSION $PKG_BUILDNUM\" > \"$PREFIX/share/scripted.txt\"\n", 0o755),
    "bin/.scripted-pre-unlink.sh": (b"#!/bin/bash\nrm -f \"$PREFIX/share/scripted.txt\"\n", 0o755),
    "share/scripted.d/keep": b"",
}, depends=["sounds"])
package("old-format", "0.9", "12_3", {
    "bin/old": (f"#!{P}/bin/python\n".encode(), 0o755), "lib/old.bin": b"\0" + P.encode() + b"/share\0", "etc/old.conf": f"{P}\n".encode(),
    "etc/default.conf": b"/opt/anaconda1anaconda2anaconda3/x\n", "share/old link": Link("../etc/old.conf"), "share/spa ced": f"{P}".encode(),
}, kind="tar.bz2", old=True, no_link=["etc/old.conf"],
    has_prefix=f"{P} text bin/old\n{P} binary lib/old.bin\n{P} text etc/old.conf\netc/default.conf\n\"{P}\" text \"share/spa ced\"\n")
SOURCE = b"value = 42\n"
pyc = subprocess.check_output([PYTHON, "-c", f"""
import importlib._bootstrap_external as b, importlib.util, marshal, sys
src = {SOURCE!r}
sys.stdout.buffer.write(b._code_to_timestamp_pyc(compile(src, 'value.py', 'exec'), {TIME}, len(src)))
sys.stderr.write('')"""])
tag = "cpython-" + MM.replace(".", "")
package("pymod", "1.0", f"py{MM.replace('.', '')}h13_0", {
    f"lib/python{MM}/site-packages/value.py": SOURCE, f"lib/python{MM}/site-packages/__pycache__/value.{tag}.pyc": pyc,
}, depends=[f"python {MM}.*"])
package("cycle-a", "1.0", "h14_0", {"share/cycle": b"a"}, depends=["cycle-b"])
package("cycle-b", "1.0", "14_0", {"share/cycle": b"b"}, subdir="noarch", noarch="generic", depends=["cycle-c >=1"])
package("cycle-c", "1.0", "h14_0", {"share/cycle": b"c"}, depends=["cycle-a"])
# rattler 0.28 cannot install this one; conda can.
package("directory", "1.0", "h15_0", {"var/empty/here": Dir(), "var/file": b"f"})
for sub in ARCH, "noarch":
    os.makedirs(os.path.join(OUT, sub), exist_ok=True)
asyncio.run(index_fs(OUT, write_zst=False, write_shards=False))
with open(os.path.join(OUT, "channel.json"), "w") as f:
    json.dump({"platform": ARCH, "python": PY}, f)
