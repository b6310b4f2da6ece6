package inventory

import (
	"strings"

	"github.com/github/go-spdx/v2/spdxexp"
)

// Licence is what a package declares. The zero value is nothing.
type Licence struct {
	Expression string   // of SPDX, "" where what is declared is not exactly one
	Names      []string // in its own words otherwise
}

// maxLicenceName bounds a name in its own words: some put the whole text there.
const maxLicenceName = 200

// classifiers that name exactly one licence of SPDX's list. "BSD License" or
// "Apache Software License" do not.
var classifiers = map[string]string{
	"MIT License": "MIT", "MIT No Attribution License (MIT-0)": "MIT-0", "ISC License (ISCL)": "ISC", "The Unlicense (Unlicense)": "Unlicense",
	"Mozilla Public License 1.0 (MPL)": "MPL-1.0", "Mozilla Public License 1.1 (MPL 1.1)": "MPL-1.1", "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
	"GNU General Public License v2 (GPLv2)": "GPL-2.0-only", "GNU General Public License v2 or later (GPLv2+)": "GPL-2.0-or-later",
	"GNU General Public License v3 (GPLv3)": "GPL-3.0-only", "GNU General Public License v3 or later (GPLv3+)": "GPL-3.0-or-later",
	"GNU Lesser General Public License v2 (LGPLv2)": "LGPL-2.0-only", "GNU Lesser General Public License v2 or later (LGPLv2+)": "LGPL-2.0-or-later",
	"GNU Lesser General Public License v3 (LGPLv3)": "LGPL-3.0-only", "GNU Lesser General Public License v3 or later (LGPLv3+)": "LGPL-3.0-or-later",
	"GNU Affero General Public License v3": "AGPL-3.0-only", "GNU Affero General Public License v3 or later (AGPLv3+)": "AGPL-3.0-or-later",
	"Boost Software License 1.0 (BSL-1.0)": "BSL-1.0", "Eclipse Public License 1.0 (EPL-1.0)": "EPL-1.0", "Eclipse Public License 2.0 (EPL-2.0)": "EPL-2.0",
	"European Union Public Licence 1.1 (EUPL 1.1)": "EUPL-1.1", "European Union Public Licence 1.2 (EUPL 1.2)": "EUPL-1.2",
	"Universal Permissive License (UPL)": "UPL-1.0", "Zero-Clause BSD (0BSD)": "0BSD", "CC0 1.0 Universal (CC0 1.0) Public Domain Dedication": "CC0-1.0",
	"Mulan Permissive Software License v2 (MulanPSL-2.0)": "MulanPSL-2.0", "SIL Open Font License 1.1 (OFL-1.1)": "OFL-1.1",
	"Blue Oak Model License (BlueOak-1.0.0)": "BlueOak-1.0.0",
}

// expression gives s if it is an expression of SPDX's own licences, normalised.
func expression(s string) string {
	if s = strings.TrimSpace(s); s == "" || s != clean(s, 1000) {
		return ""
	}
	good, _ := spdxexp.ValidateAndNormalizeLicensesWithOptions([]string{s}, spdxexp.ValidateLicensesOptions{FailAllLicenseRefs: true, FailAllDocumentRefs: true})
	if len(good) != 1 {
		return ""
	}
	return good[0]
}

// licenceOf reads License-Expression, License and the classifiers, the most
// exact first.
func licenceOf(hs []header) Licence {
	if x := expression(get(hs, "license-expression")); x != "" {
		return Licence{Expression: x}
	}
	text := get(hs, "license")
	if x := expression(text); x != "" {
		return Licence{Expression: x}
	}
	var ids, names []string
	for _, c := range getAll(hs, "classifier") {
		name, ok := strings.CutPrefix(c, "License :: ")
		name = strings.TrimPrefix(name, "OSI Approved :: ")
		if !ok || name == "OSI Approved" || name == "" {
			continue
		}
		if id := classifiers[name]; id != "" {
			ids = append(ids, id)
		}
		names = append(names, clean(name, maxLicenceName))
	}
	// Several may mean "and" or "or": that is for the reader to find out.
	if len(names) == 1 && len(ids) == 1 {
		return Licence{Expression: ids[0]}
	}
	first, _, _ := strings.Cut(text, "\n")
	if t := clean(first, maxLicenceName); t != "" {
		return Licence{Names: append([]string{t}, names...)}
	}
	return Licence{Names: names}
}
