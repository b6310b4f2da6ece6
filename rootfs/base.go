package rootfs

// Base is a read-only root file system, ready to be a lower layer.
type Base struct {
	// Name is "host" or the name given to `base add`; Digest identifies the
	// content (for the host base: of its description).
	Name   string `json:"name"`
	Digest string `json:"digest"`
	// Lowers are host directories, topmost first.
	Lowers []string `json:"lowers"`
	// Binds are shown read-only on top (the host base's /usr and /etc parts).
	Binds []Bind `json:"binds,omitempty"`
	// Env holds the image's own KEY=VALUE variables.
	Env []string `json:"env,omitempty"`
}

// Bind is one read-only host path of a base.
type Bind struct {
	Source string `json:"source"`
	Target string `json:"target"`
}
