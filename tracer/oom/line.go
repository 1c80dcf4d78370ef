package oom

import (
	"regexp"
	"strconv"
	"strings"
	"time"
)

// Line is one line of the kernel's log without what loggers put before it.
type Line struct {
	Time   time.Time     // zero when the log has none
	Uptime time.Duration // after boot; 0 when the log has none
	Text   string
}

// Forms of a line, by who wrote it. Each leaves the kernel's own text at the end.
var (
	uptimeForm = regexp.MustCompile(`^(?:<\d+>)?\[ *(\d+)\.(\d{6})\](?:\[ *[TC]\d+\])? (.*)$`)                          // dmesg
	ctimeForm  = regexp.MustCompile(`^\[(\w{3} \w{3} [ \d]\d \d{2}:\d{2}:\d{2} \d{4})\](?:\[ *[TC]\d+\])? (.*)$`)       // dmesg -T
	isoForm    = regexp.MustCompile(`^(\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}(?:[.,]\d+)?(?:Z|[+-]\d{2}:?\d{2}))\s+(.*)$`) // journalctl -o short-iso, rsyslog, dmesg --time-format iso
	syslogForm = regexp.MustCompile(`^(\w{3} [ \d]\d \d{2}:\d{2}:\d{2}(?:\.\d+)?) (.*)$`)                               // syslog, journalctl
	kernelTag  = regexp.MustCompile(`^\S+ kernel(?:\[\d+\])?: (?:\[ *\d+\.\d{6}\] ?)?(.*)$`)                            // after the time of a syslog
	isoLayouts = []string{"2006-01-02T15:04:05.999999999Z07:00", "2006-01-02T15:04:05.999999999Z0700", "2006-01-02T15:04:05Z07:00"}
)

// ParseLine reads a line of a text log: of dmesg in any of its time formats, of a syslog file or of journalctl. Lines of
// other programs than the kernel come out empty. Syslog writes no year: it is the last one in which the date is not after
// now.
func ParseLine(line string, now time.Time) Line {
	line = strings.TrimRight(line, "\r\n")
	if m := uptimeForm.FindStringSubmatch(line); m != nil {
		return Line{Uptime: uptime(m[1], m[2]), Text: m[3]}
	}
	if m := ctimeForm.FindStringSubmatch(line); m != nil {
		t, _ := time.ParseInLocation("Mon Jan _2 15:04:05 2006", m[1], now.Location())
		return Line{Time: t, Text: m[2]}
	}
	if m := isoForm.FindStringSubmatch(line); m != nil {
		return Line{Time: isoTime(m[1]), Text: withoutTag(m[2])}
	}
	if m := syslogForm.FindStringSubmatch(line); m != nil {
		return Line{Time: syslogTime(m[1], now), Text: withoutTag(m[2])}
	}
	return Line{Text: line}
}

func uptime(seconds, micros string) time.Duration {
	s, err := strconv.ParseInt(seconds, 10, 33)
	if err != nil {
		return 0
	}
	us, _ := strconv.ParseInt(micros, 10, 32)
	return time.Duration(s)*time.Second + time.Duration(us)*time.Microsecond
}

func isoTime(text string) time.Time {
	text = strings.Replace(text, ",", ".", 1)
	for _, layout := range isoLayouts {
		if t, err := time.Parse(layout, text); err == nil {
			return t
		}
	}
	return time.Time{}
}

func syslogTime(text string, now time.Time) time.Time {
	t, err := time.ParseInLocation("Jan _2 15:04:05", text, now.Location())
	if err != nil {
		return time.Time{}
	}
	t = t.AddDate(now.Year(), 0, 0)
	if t.After(now.Add(24 * time.Hour)) {
		t = t.AddDate(-1, 0, 0)
	}
	return t
}

// withoutTag cuts "HOST kernel: " off; what has another tag is not of the kernel. dmesg in iso form has no tag.
func withoutTag(text string) string {
	if m := kernelTag.FindStringSubmatch(text); m != nil {
		return m[1]
	}
	if otherTag.MatchString(text) {
		return ""
	}
	return text
}

var otherTag = regexp.MustCompile(`^\S+ [\w./@-]+\[\d+\]: `)

// parseRecord reads a record of /dev/kmsg: "PRIORITY,SEQUENCE,MICROSECONDS,FLAGS[,...];TEXT\n KEY=VALUE\n...". Bytes that
// are not printable stand as \xNN.
func parseRecord(record string) (Line, bool) {
	prefix, text, ok := strings.Cut(record, ";")
	fields := strings.Split(prefix, ",")
	if !ok || len(fields) < 3 {
		return Line{}, false
	}
	priority, err := strconv.ParseUint(fields[0], 10, 32)
	micros, err2 := strconv.ParseInt(fields[2], 10, 52)
	if err != nil || err2 != nil || priority>>3 != 0 {
		return Line{}, false // facility 0 is the kernel; anybody with the right may write to /dev/kmsg under another
	}
	text, _, _ = strings.Cut(text, "\n")
	return Line{Uptime: time.Duration(micros) * time.Microsecond, Text: unescape(text)}, true
}

func unescape(s string) string {
	if !strings.Contains(s, `\x`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if strings.HasPrefix(s[i:], `\x`) && i+4 <= len(s) {
			if v, err := strconv.ParseUint(s[i+2:i+4], 16, 8); err == nil {
				b.WriteByte(byte(v))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}
