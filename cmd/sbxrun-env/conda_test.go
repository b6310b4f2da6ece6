package main

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// What a file asks for comes with the URLs of its channels, without credentials.
func TestCondaRead(t *testing.T) {
	dir := t.TempDir()
	file, rc := filepath.Join(dir, "environment.yml"), filepath.Join(dir, "condarc")
	require.NoError(t, os.WriteFile(file, []byte("channels: [forge, 'https://u:secret@h.example/c']\ndependencies: [a, 'own::b >1', 'defaults::d', {pip: [x]}]\n"), 0o600))
	require.NoError(t, os.WriteFile(rc, []byte("channel_alias: https://m.example/t/${TOKEN}\ncustom_channels: {own: 'https://o.example'}\nchannel_priority: disabled\n"), 0o600))
	read := func(to any) error {
		b, err := json.Marshal(map[string]any{"input": file, "configs": []string{rc}, "platform": "linux-64", "dir": dir, "alias": "https://fallback.example", "variables": map[string]string{"TOKEN": "secret"}})
		if err != nil {
			return err
		}
		return json.Unmarshal(b, to)
	}
	got, err := condaRead(context.Background(), read)
	require.NoError(t, err)
	assert.Equal(t, condaSpec{
		Channels: []string{"https://m.example/forge", "https://h.example/c", "https://o.example/own", "https://m.example/main", "https://m.example/r"},
		Specs:    []string{"a", "https://o.example/own::b >1", "d"}, Pip: []string{"x"}, AnyChannel: true,
	}, got)
}

func TestSolvedLock(t *testing.T) {
	l, err := solvedLock([]byte(`{"packages":[
		{"name":"b","version":"1","build":"0","subdir":"noarch","fn":"b-1-0.conda","url":"https://h.example/c/noarch/b-1-0.conda","channel":"https://h.example/c/","sha256":"aa","size":7,"track_features":"x y","depends":["a"]},
		{"name":"a","version":"1","build":"0","subdir":"linux-64","fn":"a-1-0.tar.bz2","url":"https://h.example/c/linux-64/a-1-0.tar.bz2","channel":"https://h.example/c/","md5":"bb","track_features":["z"]}]}`), "linux-64")
	require.NoError(t, err)
	require.Len(t, l.Packages, 2)
	assert.Equal(t, []string{"https://h.example/c"}, l.Channels)
	assert.Equal(t, "a", l.Packages[0].Name, "by name: equal solutions give equal locks")
	assert.Equal(t, []string{"z"}, l.Packages[0].TrackFeatures)
	assert.Equal(t, []string{"x", "y"}, l.Packages[1].TrackFeatures)
	assert.EqualValues(t, 7, l.Packages[1].SizeBytes)
	_, err = solvedLock([]byte(`{"packages":[{"name":"a"}]}`), "linux-64")
	require.ErrorContains(t, err, "package a: its channel gives no hash")
}
