// Runs a template of Ollama's kind as Ollama does: Go's text/template with missing keys as zero, and consecutive
// messages of one role joined by an empty line. Reads {"template": ..., "conversations": [[{"role", "content"}]]} from
// standard input; writes a JSON array of {"text", "error"}.
package main

import (
	"bytes"
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type message struct {
	Role    string `json:"role"`
	Content string `json:"content"`
}

type answer struct {
	Text  string `json:"text"`
	Error string `json:"error"`
}

func main() {
	var request struct {
		Template      string      `json:"template"`
		Conversations [][]message `json:"conversations"`
	}
	if err := json.NewDecoder(os.Stdin).Decode(&request); err != nil {
		panic(err)
	}
	parsed := template.Must(template.New("").Option("missingkey=zero").Parse(request.Template))
	answers := []answer{}
	for _, conversation := range request.Conversations {
		var text bytes.Buffer
		var said answer
		if err := parsed.Execute(&text, values(conversation)); err != nil {
			said.Error = err.Error()
		} else {
			said.Text = text.String()
		}
		answers = append(answers, said)
	}
	if err := json.NewEncoder(os.Stdout).Encode(answers); err != nil {
		panic(err)
	}
}

func values(conversation []message) map[string]any {
	var joined []*message
	var system []string
	for i := range conversation {
		if conversation[i].Role == "system" {
			system = append(system, conversation[i].Content)
		}
		if n := len(joined); n > 0 && joined[n-1].Role == conversation[i].Role {
			joined[n-1].Content += "\n\n" + conversation[i].Content
		} else {
			joined = append(joined, &conversation[i])
		}
	}
	return map[string]any{"Messages": joined, "System": strings.Join(system, "\n\n"), "Response": ""}
}
