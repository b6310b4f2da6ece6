package conda

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"

	"go.yaml.in/yaml/v3"
)

// parseYAML decodes one document. The library refuses documents whose aliases
// expand out of proportion and nesting beyond 10,000; data's length is bounded by
// the caller.
func parseYAML(data []byte, to any) (err error) {
	defer func() {
		// Its parser still panics for a few malformed inputs.
		if r := recover(); r != nil {
			err = fmt.Errorf("read lock: not YAML: %v", r)
		}
	}()
	d := yaml.NewDecoder(bytes.NewReader(data))
	if err := d.Decode(to); err != nil {
		if errors.Is(err, io.EOF) {
			return errors.New("read lock: empty")
		}
		return fmt.Errorf("read lock: %s", shown(strings.ReplaceAll(strings.TrimPrefix(err.Error(), "yaml: "), "\n", " ")))
	}
	if err := d.Decode(new(yaml.Node)); !errors.Is(err, io.EOF) {
		return errors.New("read lock: more than one YAML document")
	}
	return nil
}

// text is a scalar as it is written: YAML would make 1.10 a number.
type text string

func (t *text) UnmarshalYAML(n *yaml.Node) error {
	if n.Kind == yaml.AliasNode {
		n = n.Alias
	}
	if n.Kind != yaml.ScalarNode {
		return fmt.Errorf("line %d: expected a text", n.Line)
	}
	if n.Tag != "!!null" {
		*t = text(n.Value)
	}
	return nil
}

func texts(in []text) []string {
	var out []string
	for _, t := range in {
		out = append(out, string(t))
	}
	return out
}
