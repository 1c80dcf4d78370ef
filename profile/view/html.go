package view

import (
	"bytes"
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"html"
	"io"
	"strings"
)

var (
	//go:embed page/page.html
	pageHTML string
	//go:embed page/page.css
	pageCSS string
	//go:embed page/page.js
	pageJS string
)

// WriteHTML writes the page as one file that fetches nothing and can be sent to a colleague.
func WriteHTML(w io.Writer, in Input) error { return writePage(w, in, false) }

func writePage(w io.Writer, in Input, served bool) error {
	var data bytes.Buffer
	if err := json.NewEncoder(&data).Encode(newPage(in, served)); err != nil { // escapes <, > and &, so that no </script> is in it
		return fmt.Errorf("write page: %w", err)
	}
	// Not html/template: it would have to parse the script at each start, and costs 2.6 MB of binary.
	fill := strings.NewReplacer(
		"{{.Policy}}", policy(), "{{.Title}}", html.EscapeString("allocsnoop: "+in.Name),
		"{{.Style}}", pageCSS, "{{.Script}}", pageJS, "{{.Data}}", data.String(),
	)
	if _, err := fill.WriteString(w, pageHTML); err != nil {
		return fmt.Errorf("write page: %w", err)
	}
	return nil
}

// policy allows the page's own script and style by their hashes, and nothing else.
func policy() string {
	hash := func(s string) string {
		sum := sha256.Sum256([]byte(s))
		return "'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "'"
	}
	return "default-src 'none'; script-src " + hash(pageJS) + "; style-src " + hash(pageCSS) + "; img-src data:; base-uri 'none'; form-action 'none'"
}
