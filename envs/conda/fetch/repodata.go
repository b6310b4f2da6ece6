package fetch

import (
	"bufio"
	"compress/bzip2"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"

	"github.com/klauspost/compress/zstd"
)

// maxRepodataBytes bounds an index as it is unpacked; the largest that is known
// has a tenth of it.
const maxRepodataBytes = 4 << 30

// Repodata is one index of a channel as it was fetched.
type Repodata struct {
	SHA256    string `json:"sha256"` // of the file, unpacked; "" where Same or Missing
	SizeBytes int64  `json:"size_bytes"`
	ETag      string `json:"etag,omitempty"` // of the variant that was fetched
	Variant   string `json:"variant"`        // the file's name at the channel
	Same      bool   `json:"same"`           // as known has it: nothing was written
	Missing   bool   `json:"missing"`        // the channel has none for this subdir
}

// Repodata fetches the index of a channel's subdir into the file to, unpacked.
// known is what is had already, the zero value is nothing.
func (c *Client) Repodata(ctx context.Context, channel, subdir, to string, known Repodata) (Repodata, error) {
	for _, variant := range []string{"repodata.json.zst", "repodata.json.bz2", "repodata.json"} {
		got := Repodata{Variant: variant}
		err := c.retry(ctx, func() error {
			header := http.Header{}
			if known.ETag != "" && known.Variant == variant {
				header.Set("If-None-Match", known.ETag)
			}
			r, err := c.open(ctx, channel+"/"+subdir+"/"+variant, header)
			if err != nil {
				return err
			}
			defer r.Body.Close()
			if r.Status == http.StatusNotModified {
				got = known
				got.Same = true
				return nil
			}
			got.ETag = r.Header.Get("ETag")
			got.SHA256, got.SizeBytes, err = unpack(r.Body, variant, to)
			return err
		})
		if err == nil {
			return got, nil
		}
		if !isMissing(err) {
			return Repodata{}, err
		}
	}
	return Repodata{Missing: true}, nil
}

func isMissing(err error) bool {
	var s *StatusError
	return errors.As(err, &s) && s.Code == http.StatusNotFound
}

func unpack(body io.Reader, variant, to string) (sum string, n int64, err error) {
	var r io.Reader = bufio.NewReaderSize(body, 1<<20)
	switch variant {
	case "repodata.json.zst":
		z, err := zstd.NewReader(r, zstd.WithDecoderMaxMemory(maxRepodataBytes), zstd.WithDecoderMaxWindow(1<<31))
		if err != nil {
			return "", 0, gone{err}
		}
		defer z.Close()
		r = z
	case "repodata.json.bz2":
		r = bzip2.NewReader(r)
	}
	f, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o644)
	if err != nil {
		return "", 0, gone{err}
	}
	h := sha256.New()
	n, err = io.Copy(io.MultiWriter(f, h), io.LimitReader(r, maxRepodataBytes+1))
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil && n > maxRepodataBytes {
		err = gonef("larger than %d bytes", int64(maxRepodataBytes))
	}
	if err != nil {
		return "", 0, fmt.Errorf("unpack %s: %w", variant, plain(err))
	}
	return hex.EncodeToString(h.Sum(nil)), n, nil
}
