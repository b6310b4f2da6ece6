package conda

import "errors"

// Activation gives what activating the prefix in root would set, root being found
// at prefix when it is used: variables as NAME=VALUE, folders to put before PATH,
// and what could not be understood without a shell, each with the file's name.
func Activation(root, prefix string) (vars, pathPrefix, warnings []string, err error) {
	return nil, nil, nil, errors.New("read activation: not yet")
}
