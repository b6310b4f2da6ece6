# Makes testdata/markers.txt and ../pep440/testdata/packaging.txt with the packaging library; run in envs/recipes.
import random, itertools, packaging, sys, json
from packaging.version import Version, InvalidVersion
from packaging.specifiers import Specifier, InvalidSpecifier
from packaging.markers import Marker, InvalidMarker, UndefinedComparison, UndefinedEnvironmentName
r = random.Random(7)
vs = ["1","1.0","1.0.0","1.1","1.10","1.2","0.9","1.0a1","1.0.a.1","1.0alpha","1.0b2","1.0rc1","1.0c1","1.0pre3","1.0.post1","1.0-1","1.0.rev2","1.0.r","1.0.dev1","1.0dev","1.0a1.dev2","1.0a1.post1","1.0.post1.dev3","1!1.0","1!0.5","2!0","1.0+abc","1.0+abc.1","1.0+1","1.0+abc-2","1.0+2.abc","1.0.post1+x","v1.0"," 1.0 ","1.0.0.0.1","2026.10.19.post1","3.11.7","3.9","3.10","3.10.0rc2","3.11","3.12.0a7","3.9.1+","1..0","","1.0+","1.0_a1","1.0+a..b","a","1.0-","1.0.dev","1.0-preview-4","1.0.POST5","1.0RC1","01.02","1.0++a","1.0+Ä","1.0a","1.0.post","1!","!1","1.0.*","6.18.0-generic"]
ops = ["==","!=","<=",">=","<",">","~="]
out=[]
norm=[]
for v in vs:
    try: out.append(("v", v, str(Version(v))))
    except InvalidVersion: out.append(("v", v, "-"))
good=[v for v in vs if not v=="" ]
valid=[]
for v in vs:
    try: Version(v); valid.append(v)
    except InvalidVersion: pass
for a,b in itertools.combinations(valid,2):
    x,y=Version(a),Version(b)
    out.append(("c",a,b,"<" if x<y else ">" if x>y else "="))
specs=[]
for o in ops:
    for v in vs+["1.*","1.0.*","3.*","3.11.*","1!1.*","1.0a1.*"]:
        specs.append(o+v)
for s in specs:
    try: sp=Specifier(s)
    except InvalidSpecifier:
        if "+" not in s and not s.endswith("1.0a1.*"): # those are taken
            out.append(("s",s,"-"))
        continue
    for v in r.sample(valid,12)+["6.18.0-generic"]:
        out.append(("a",s,v,str(int(sp.contains(v,prereleases=True)))))
with open("../pep440/testdata/packaging.txt","w") as f:
    f.write(f"# by tables.py with packaging {packaging.__version__}: v VERSION normal form; c A B order; s SPECIFIER -; a SPECIFIER VERSION allowed\n")
    for o in out: f.write(json.dumps(o,ensure_ascii=False)+"\n")
envs=[dict(implementation_name="cpython",implementation_version="3.11.2",os_name="posix",platform_machine="x86_64",platform_release="6.18.0-generic",platform_system="Linux",platform_version="#1 SMP",python_full_version="3.11.2",platform_python_implementation="CPython",python_version="3.11",sys_platform="linux",extra="web"),
 dict(implementation_name="cpython",implementation_version="3.9.25",os_name="posix",platform_machine="aarch64",platform_release="5.10",platform_system="Linux",platform_version="#2",python_full_version="3.9.25",platform_python_implementation="CPython",python_version="3.9",sys_platform="linux",extra=""),
 dict(implementation_name="pypy",implementation_version="7.3.20",os_name="nt",platform_machine="AMD64",platform_release="10",platform_system="Windows",platform_version="10.0",python_full_version="3.14.0rc1",platform_python_implementation="PyPy",python_version="3.14",sys_platform="win32",extra="fast")]
vars=["python_version","python_full_version","os_name","sys_platform","platform_release","platform_system","platform_version","platform_machine","platform_python_implementation","implementation_name","implementation_version","os.name","python_implementation","sys.platform"]
mops=["==","!=","<=",">=","<",">","~=","in","not in","not  in","==="]
vals=["3.11","3.9","3.10","3","3.11.2","3.*","3.11.*","3.9.25","2.7 3.9 3.11","linux","win32","posix","Linux","x86_64","arm64 aarch64","CPython","cpython","","6.18","5.10","3.14.0rc1","7"]
def atom():
    v=r.choice(vars); o=r.choice(mops); q=r.choice("'\""); s=q+r.choice(vals)+q
    sp=r.choice([" ",""," \t"]) if o[0] in "=!<>~" else " "
    if r.random()<.1:
        return r.choice(['extra == "web"',"extra != 'fast'","extra=='Web'"])
    return v+sp+o+sp+s if r.random()<.75 else s+sp+o+sp+v
def expr(d):
    if d==0 or r.random()<.4: return atom()
    e=r.choice([" and "," or "]).join(expr(d-1) for _ in range(r.randint(1,3)))
    return "("+e+")" if r.random()<.5 else e
ms=[expr(3) for _ in range(1500)]+[atom() for _ in range(1500)]
ms+=["","(","python_version","python_version >","python_version > 3","python_version > '3' and","python_version > '3' or or os_name == 'posix'","foo == 'x'","'a' == 'b'","python_version>'3'os_name=='x'","python_version > '3'and os_name == 'posix'","(python_version > '3')and(os_name == 'posix')","python_version > '3' ) ","not python_version > '3'","os_name == 'posix' in 'x'","python_version > \"3'","os_name is 'posix'","os_name == posix", "sys_platform in 'linux darwin'", "python_versions == '3'"]
with open("testdata/markers.txt","w") as f:
    f.write(f"# by tables.py with packaging {packaging.__version__}: MARKER and what it is in each environment: 1, 0, - refused\n")
    f.write(json.dumps(envs)+"\n")
    for m in dict.fromkeys(ms):
        try: k=Marker(m)
        except InvalidMarker: f.write(json.dumps([m,"-"])+"\n"); continue
        res=""
        for e in envs:
            try: res+=str(int(k.evaluate(e)))
            except (UndefinedComparison,UndefinedEnvironmentName): res+="-"
        f.write(json.dumps([m,res])+"\n")
