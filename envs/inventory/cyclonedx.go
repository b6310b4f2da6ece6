package inventory

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"strings"
	"time"

	cdx "github.com/CycloneDX/cyclonedx-go"
)

// CycloneDX writes the inventory as CycloneDX 1.6, JSON. The same environment
// gives the same bytes: the serial number is made of its digest, the time is
// that of its bake.
func (v *Inventory) CycloneDX(w io.Writer, tool string) error {
	root := cdx.Component{
		BOMRef: v.Env.Digest, Type: cdx.ComponentTypeApplication, Name: v.name(), Version: v.Env.Digest,
		Hashes:     &[]cdx.Hash{{Algorithm: cdx.HashAlgoSHA256, Value: strings.TrimPrefix(v.Env.Digest, "sha256:")}},
		Properties: properties("sbxrun:kind", v.kind(), "sbxrun:lock", v.Env.Lock, "sbxrun:python", v.Python, "sbxrun:base", v.Env.Base, "sbxrun:base-digest", v.Env.BaseDigest),
	}
	for _, d := range v.Env.Below {
		*root.Properties = append(*root.Properties, cdx.Property{Name: "sbxrun:below", Value: d})
	}
	bom := cdx.NewBOM()
	bom.SerialNumber = v.serial("cyclonedx")
	bom.Metadata = &cdx.Metadata{
		Timestamp: v.Env.CreatedAt.UTC().Format(time.RFC3339), Component: &root,
		Lifecycles: &[]cdx.Lifecycle{{Phase: cdx.LifecyclePhasePostBuild}},
		Tools:      &cdx.ToolsChoice{Components: &[]cdx.Component{{Type: cdx.ComponentTypeApplication, Name: "sbxrun", Version: tool}}},
	}
	refs := v.refs()
	components := []cdx.Component{}
	deps := []cdx.Dependency{{Ref: root.BOMRef, Dependencies: refsOf(refs, v.roots())}}
	for i, p := range v.Packages {
		components = append(components, p.component(refs[i]))
		deps = append(deps, cdx.Dependency{Ref: refs[i], Dependencies: refsOf(refs, p.Depends)})
	}
	bom.Components, bom.Dependencies = &components, &deps
	if err := cdx.NewBOMEncoder(w, cdx.BOMFileFormatJSON).SetPretty(true).EncodeVersion(bom, cdx.SpecVersion1_6); err != nil {
		return fmt.Errorf("write CycloneDX: %w", err)
	}
	return nil
}

func (v *Inventory) name() string {
	if len(v.Env.Names) > 0 {
		return v.Env.Names[0]
	}
	return "environment"
}

func (v *Inventory) kind() string {
	if v.Env.Kind == "" {
		return "venv"
	}
	return v.Env.Kind
}

// serial is a UUID (version 8) of what the document is about.
func (v *Inventory) serial(format string) string {
	id := v.id(format)
	id[6], id[8] = id[6]&0x0f|0x80, id[8]&0x3f|0x80
	s := hex.EncodeToString(id[:16])
	return "urn:uuid:" + s[:8] + "-" + s[8:12] + "-" + s[12:16] + "-" + s[16:20] + "-" + s[20:]
}

// id is of the environment, its record's words and what was read.
func (v *Inventory) id(format string) [sha256.Size]byte {
	h := sha256.New()
	fmt.Fprintf(h, "%s %s %q %q %q\n", format, v.Env.Digest, v.Env.Below, v.name(), v.Env.Lock)
	for _, p := range v.Packages {
		fmt.Fprintf(h, "%s\n", p.PURL())
	}
	return [sha256.Size]byte(h.Sum(nil))
}

// refs names the packages inside one document: by package URL, and by number
// where two have the same.
func (v *Inventory) refs() []string {
	seen := map[string]int{}
	var out []string
	for _, p := range v.Packages {
		s := p.PURL()
		seen[s]++
		if n := seen[s]; n > 1 {
			s += fmt.Sprintf("#%d", n)
		}
		out = append(out, s)
	}
	return out
}

func refsOf(refs []string, which []int) *[]string {
	if len(which) == 0 {
		return nil
	}
	out := make([]string, 0, len(which))
	for _, i := range which {
		out = append(out, refs[i])
	}
	return &out
}

// properties makes some of names and values; without a value there is none.
func properties(kv ...string) *[]cdx.Property {
	out := []cdx.Property{}
	for i := 0; i < len(kv); i += 2 {
		if kv[i+1] != "" {
			out = append(out, cdx.Property{Name: kv[i], Value: kv[i+1]})
		}
	}
	return &out
}

func (p *Package) component(ref string) cdx.Component {
	c := cdx.Component{BOMRef: ref, Type: cdx.ComponentTypeLibrary, Name: p.Name, Version: p.Version, PackageURL: p.PURL(), Description: p.Summary}
	var hashes []cdx.Hash
	if p.SHA256 != "" {
		hashes = append(hashes, cdx.Hash{Algorithm: cdx.HashAlgoSHA256, Value: p.SHA256})
	}
	if p.MD5 != "" {
		hashes = append(hashes, cdx.Hash{Algorithm: cdx.HashAlgoMD5, Value: p.MD5})
	}
	if len(hashes) > 0 {
		c.Hashes = &hashes
	}
	c.Licenses = p.Licence.choices()
	if p.URL != "" {
		c.ExternalReferences = &[]cdx.ExternalReference{{URL: p.URL, Type: cdx.ERTypeDistribution, Hashes: c.Hashes}}
	}
	props := *properties("sbxrun:record-sha256", p.Record, "sbxrun:pypi-project", p.Project)
	for _, s := range p.Locked {
		props = append(props, cdx.Property{Name: "sbxrun:locked-sha256", Value: s})
	}
	for _, f := range p.LicenceFiles {
		props = append(props, cdx.Property{Name: "sbxrun:license-file", Value: clean(f, 1000)})
	}
	if len(props) > 0 {
		c.Properties = &props
	}
	return c
}

func (l Licence) choices() *cdx.Licenses {
	var out cdx.Licenses
	switch {
	case l.Expression == "" && len(l.Names) == 0:
		return nil
	case l.Expression == "":
		for _, n := range l.Names {
			out = append(out, cdx.LicenseChoice{License: &cdx.License{Name: n, Acknowledgement: cdx.LicenseAcknowledgementDeclared}})
		}
	case strings.ContainsAny(l.Expression, " (+"):
		out = cdx.Licenses{{Expression: l.Expression}}
	default:
		out = cdx.Licenses{{License: &cdx.License{ID: l.Expression, Acknowledgement: cdx.LicenseAcknowledgementDeclared}}}
	}
	return &out
}
