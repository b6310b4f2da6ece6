// Compiles rules with libseccomp and writes the filter: the differential
// test's oracle. Input, a line a rule:
//   name number action nargs {index op mask value}...     op: 0 ==, 1 masked ==
#include <errno.h>
#include <seccomp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int main(int argc, char **argv)
{
	uint32_t arch = !strcmp(argv[1], "arm64") ? SCMP_ARCH_AARCH64 : SCMP_ARCH_X86_64;
	scmp_filter_ctx c = seccomp_init(SCMP_ACT_ERRNO(EPERM));
	if (!c || seccomp_attr_set(c, SCMP_FLTATR_ACT_BADARCH, SCMP_ACT_KILL_PROCESS))
		return 2;
	if (arch != seccomp_arch_native() &&
	    (seccomp_arch_add(c, arch) || seccomp_arch_remove(c, SCMP_ARCH_NATIVE)))
		return 3;
	char name[64];
	long nr;
	unsigned action, n;
	while (scanf("%63s %ld %u %u", name, &nr, &action, &n) == 4) {
		struct scmp_arg_cmp a[6];
		memset(a, 0, sizeof a);
		for (unsigned i = 0; i < n; i++) {
			unsigned idx, op;
			unsigned long mask, value;
			if (scanf("%u %u %lu %lu", &idx, &op, &mask, &value) != 4)
				return 4;
			a[i] = op ? SCMP_CMP64(idx, SCMP_CMP_MASKED_EQ, mask, value)
				  : SCMP_CMP64(idx, SCMP_CMP_EQ, value);
		}
		// The numbers must be libseccomp's own, where it knows the call.
		int own = seccomp_syscall_resolve_name_arch(arch, name);
		if (own >= 0 && own != nr) {
			fprintf(stderr, "%s is %d, not %ld\n", name, own, nr);
			return 5;
		}
		// Numbers are the native architecture's to libseccomp: translate by name.
		int id = own >= 0 ? seccomp_syscall_resolve_name(name) : (int)nr;
		if (own < 0 && arch != seccomp_arch_native())
			continue; // newer than the library
		int rc = seccomp_rule_add_array(c, action, id, n, a);
		if (rc) {
			fprintf(stderr, "%s: %s\n", name, strerror(-rc));
			return 6;
		}
	}
	return seccomp_export_bpf(c, 1) ? 7 : 0;
}
