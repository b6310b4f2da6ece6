package envs

// pycs names how bytecode is made, for the keys of what has it inside.
const pycs = "unchecked-hash, names interned"

// compileScript is compileall with two things settled before it begins.
//
// Python keeps one object for each string of one Latin-1 character. Once any
// module has such a letter as a name, that object is interned for the rest of
// the process, and marshal writes it so in every later module that has it as
// text: what a module compiles to depended on which modules the same worker had
// before. (Seen in one byte of html5lib's constants; Python 3.13 has all of
// them interned.) So all are, from the start.
//
// As of 3.12 compileall asks for workers that do not inherit that. They are
// forked here.
const compileScript = `import sys
for c in range(128, 256):
    sys.intern(chr(c))
import compileall
try:
    import concurrent.futures, multiprocessing
    pool = concurrent.futures.ProcessPoolExecutor
    concurrent.futures.ProcessPoolExecutor = lambda max_workers=None, mp_context=None: pool(max_workers, multiprocessing.get_context("fork"))
except ImportError:
    pass
sys.exit(not compileall.main())`

// compileArgs are an interpreter's arguments that compile what args, those of
// compileall, name. -I and -S: no code of the packages runs (.pth files).
func compileArgs(args ...string) []string {
	return append([]string{"-I", "-S", "-c", compileScript, "-q", "-j", "0", "--invalidation-mode", "unchecked-hash"}, args...)
}
