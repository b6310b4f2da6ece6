package envs

import "context"

func (b *recipeBake) apt(ctx context.Context, s *stage, out *built) error {
	return fail("", "apt: not yet")
}
