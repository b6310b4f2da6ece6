package inventory

import (
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"time"
)

// The documents of SPDX 2.3 that we write. (The library, tools-golang, brings
// RDF, YAML and XML along for a dozen fields of JSON.)
type spdxDocument struct {
	Version       string             `json:"spdxVersion"`
	DataLicense   string             `json:"dataLicense"`
	ID            string             `json:"SPDXID"`
	Name          string             `json:"name"`
	Namespace     string             `json:"documentNamespace"`
	Creation      spdxCreation       `json:"creationInfo"`
	Describes     []string           `json:"documentDescribes"`
	Packages      []spdxPackage      `json:"packages"`
	Relationships []spdxRelationship `json:"relationships"`
	Extracted     []spdxExtracted    `json:"hasExtractedLicensingInfos,omitempty"`
}

type spdxCreation struct {
	Created  string   `json:"created"`
	Creators []string `json:"creators"`
}

type spdxPackage struct {
	Name             string         `json:"name"`
	ID               string         `json:"SPDXID"`
	Version          string         `json:"versionInfo"`
	Download         string         `json:"downloadLocation"`
	FilesAnalyzed    bool           `json:"filesAnalyzed"`
	Checksums        []spdxChecksum `json:"checksums,omitempty"`
	LicenseConcluded string         `json:"licenseConcluded"`
	LicenseDeclared  string         `json:"licenseDeclared"`
	LicenseComments  string         `json:"licenseComments,omitempty"`
	Copyright        string         `json:"copyrightText"`
	Summary          string         `json:"summary,omitempty"`
	Comment          string         `json:"comment,omitempty"`
	Purpose          string         `json:"primaryPackagePurpose,omitempty"`
	Refs             []spdxRef      `json:"externalRefs,omitempty"`
}

type spdxChecksum struct {
	Algorithm string `json:"algorithm"`
	Value     string `json:"checksumValue"`
}

type spdxRef struct {
	Category string `json:"referenceCategory"`
	Type     string `json:"referenceType"`
	Locator  string `json:"referenceLocator"`
}

type spdxRelationship struct {
	Element string `json:"spdxElementId"`
	Type    string `json:"relationshipType"`
	Related string `json:"relatedSpdxElement"`
}

type spdxExtracted struct {
	ID   string `json:"licenseId"`
	Name string `json:"name"`
	Text string `json:"extractedText"`
}

const (
	noAssertion  = "NOASSERTION"
	spdxRoot     = "SPDXRef-Environment"
	spdxDocID    = "SPDXRef-DOCUMENT"
	spdxLicRef   = "LicenseRef-declared-"
	declaredOnly = "as the package's own metadata declares it; the text is in its files"
)

// SPDX writes the inventory as SPDX 2.3, JSON, the same bytes for the same environment.
func (v *Inventory) SPDX(w io.Writer, tool string) error {
	id := v.id("spdx")
	d := spdxDocument{
		Version: "SPDX-2.3", DataLicense: "CC0-1.0", ID: spdxDocID, Name: v.name(),
		Namespace: "https://github.com/sbxrun/sbxrun/spdx/" + hex.EncodeToString(id[:]),
		Creation:  spdxCreation{v.Env.CreatedAt.UTC().Format(time.RFC3339), []string{"Tool: sbxrun-" + tool}},
		Describes: []string{spdxRoot},
		Packages: []spdxPackage{{
			Name: v.name(), ID: spdxRoot, Version: v.Env.Digest, Download: noAssertion, LicenseConcluded: noAssertion, LicenseDeclared: noAssertion, Copyright: noAssertion,
			Checksums: []spdxChecksum{{"SHA256", strings.TrimPrefix(v.Env.Digest, "sha256:")}}, Purpose: "APPLICATION",
			Comment: v.comment(),
		}},
		Relationships: []spdxRelationship{{spdxDocID, "DESCRIBES", spdxRoot}},
	}
	extracted := map[string]string{} // name to ID
	ids := make([]string, len(v.Packages))
	seen := map[string]bool{}
	for i, p := range v.Packages {
		ids[i] = "SPDXRef-Package-" + p.System + "-" + spdxID(p.Name) + "-" + spdxID(p.Version)
		if seen[ids[i]] {
			ids[i] += fmt.Sprintf("-%d", i)
		}
		seen[ids[i]] = true
		s := p.spdx(ids[i])
		if names := p.Licence.Names; len(names) == 1 {
			if extracted[names[0]] == "" {
				extracted[names[0]] = fmt.Sprintf("%s%d", spdxLicRef, len(extracted)+1)
				d.Extracted = append(d.Extracted, spdxExtracted{extracted[names[0]], names[0], names[0] + " (" + declaredOnly + ")"})
			}
			s.LicenseDeclared = extracted[names[0]]
		}
		d.Packages = append(d.Packages, s)
	}
	for i, p := range v.Packages {
		d.Relationships = append(d.Relationships, spdxRelationship{spdxRoot, "CONTAINS", ids[i]})
		for _, j := range p.Depends {
			d.Relationships = append(d.Relationships, spdxRelationship{ids[i], "DEPENDS_ON", ids[j]})
		}
	}
	for _, i := range v.roots() {
		d.Relationships = append(d.Relationships, spdxRelationship{spdxRoot, "DEPENDS_ON", ids[i]})
	}
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	if err := e.Encode(d); err != nil {
		return fmt.Errorf("write SPDX: %w", err)
	}
	return nil
}

func (v *Inventory) comment() string {
	s := fmt.Sprintf("%s environment, lock %s, Python %s, base %s", v.kind(), v.Env.Lock, v.Python, v.Env.Base)
	if v.Env.BaseDigest != "" {
		s += " " + v.Env.BaseDigest
	}
	for _, b := range v.Env.Below {
		s += ", over " + b
	}
	return s
}

// spdxID keeps what an identifier may hold.
func spdxID(s string) string {
	return strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '.' || r == '-' {
			return r
		}
		return '-'
	}, s)
}

func (p *Package) spdx(id string) spdxPackage {
	s := spdxPackage{
		Name: p.Name, ID: id, Version: p.Version, Download: noAssertion, LicenseConcluded: noAssertion, LicenseDeclared: noAssertion, Copyright: noAssertion,
		Summary: p.Summary, Purpose: "LIBRARY", Refs: []spdxRef{{"PACKAGE-MANAGER", "purl", p.PURL()}},
	}
	if p.URL != "" {
		s.Download = p.URL
	}
	if p.SHA256 != "" {
		s.Checksums = append(s.Checksums, spdxChecksum{"SHA256", p.SHA256})
	}
	if p.MD5 != "" {
		s.Checksums = append(s.Checksums, spdxChecksum{"MD5", p.MD5})
	}
	if p.Licence.Expression != "" {
		s.LicenseDeclared = p.Licence.Expression
	}
	var notes []string
	if n := p.Licence.Names; len(n) > 1 {
		notes = append(notes, "declared: "+strings.Join(n, "; "))
	}
	if len(p.LicenceFiles) > 0 {
		notes = append(notes, "licence files: "+clean(strings.Join(p.LicenceFiles, ", "), 4000))
	}
	s.LicenseComments = strings.Join(notes, ". ")
	if len(p.Locked) > 0 {
		s.Comment = "the lock lets through the distributions with sha256 " + strings.Join(p.Locked, ", ")
	}
	if p.Record != "" {
		s.Comment = strings.TrimPrefix(s.Comment+"; sha256 of RECORD: "+p.Record, "; ")
	}
	return s
}
