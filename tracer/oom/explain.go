package oom

import (
	"fmt"
	"strings"

	"github.com/allocsnoop/allocsnoop/profile"
)

// Fact is one line of an explanation.
type Fact struct{ Name, Text string }

// maxShown bounds names in an explanation, which is to fit on lines of 100 columns.
const maxShown = 84

// Headline says in one line who was killed and why.
func (k *Kill) Headline() string {
	user := ""
	if k.UID != nil {
		user = fmt.Sprintf(", user %d", *k.UID)
	}
	return fmt.Sprintf("%s (pid %d%s) was killed: %s", show(k.Comm, 40), k.PID, user, k.cause())
}

func (k *Kill) cause() string {
	if k.Manual {
		return "somebody told the kernel to kill (SysRq f)"
	}
	switch k.Scope {
	case Cgroup:
		return "its cgroup met a memory limit"
	case System:
		return "the machine had no memory left"
	case Nodes:
		return "the NUMA nodes it may use had no memory left"
	}
	return "out of memory"
}

// Facts explain the kill, the most useful first. What the log did not tell is left out.
func (k *Kill) Facts() []Fact {
	var facts []Fact
	add := func(name, text string) {
		if text != "" {
			facts = append(facts, Fact{name, text})
		}
	}
	add("limit", k.limitText())
	add("of cgroup", show(k.LimitCgroup, maxShown))
	if k.LimitCgroup != k.TaskCgroup {
		add("victim in", show(k.TaskCgroup, maxShown))
	}
	add("container", k.containerText())
	add("held", k.heldText())
	add("asked by", k.invokerText())
	add("chosen", k.chosenText())
	add("largest", k.largestText())
	add("meaning", k.meaning())
	return facts
}

func (k *Kill) limitText() string {
	if k.Usage == nil {
		return ""
	}
	text := size(k.Usage) + " in use"
	if k.Limit != nil {
		text += " of " + size(k.Limit)
	}
	if k.Failures != nil {
		text += fmt.Sprintf(", hit %d times", *k.Failures)
	}
	return text
}

func (k *Kill) containerText() string {
	var parts []string
	if id := k.Container.Short(); id != "" {
		parts = append(parts, show(id, 40))
	}
	if k.Container.Pod != "" {
		parts = append(parts, "pod "+k.Container.Pod)
	}
	if k.Container.Runtime != "" {
		parts = append(parts, k.Container.Runtime)
	}
	return strings.Join(parts, ", ")
}

func (k *Kill) heldText() string {
	var parts []string
	for _, p := range []struct {
		bytes *uint64
		kind  string
	}{{k.Anon, "anonymous"}, {k.File, "of files"}, {k.Shmem, "shared"}, {k.PageTables, "page tables"}} {
		if p.bytes != nil && *p.bytes > 0 {
			parts = append(parts, size(p.bytes)+" "+p.kind)
		}
	}
	return strings.Join(parts, ", ")
}

func (k *Kill) invokerText() string {
	i := k.Invoker
	if i.Comm == "" || k.Manual {
		return ""
	}
	who := show(i.Comm, 40)
	switch {
	case i.PID == k.PID:
		who += ", the victim itself"
	case i.PID != 0:
		who += fmt.Sprintf(" (pid %d), not the victim", i.PID)
	}
	pages := "one page"
	if i.Order > 0 && i.Order < 32 {
		pages = fmt.Sprintf("%d pages in a row", 1<<i.Order)
	}
	return who + ", for " + pages
}

func (k *Kill) chosenText() string {
	var parts []string
	if k.Group {
		parts = append(parts, "memory.oom.group: the whole group is killed")
	}
	if k.Asker {
		parts = append(parts, "vm.oom_kill_allocating_task: whoever asks is killed")
	}
	if k.Score != nil {
		parts = append(parts, fmt.Sprintf("score %d (1000 is all memory)", *k.Score))
	}
	if k.ScoreAdj != nil {
		parts = append(parts, fmt.Sprintf("oom_score_adj %d%s", *k.ScoreAdj, adjMeaning(*k.ScoreAdj)))
	}
	if k.Candidates > 0 {
		parts = append(parts, "of "+count(k.Candidates, "process", "processes"))
	}
	return strings.Join(parts, ", ")
}

func adjMeaning(adj int) string {
	switch {
	case adj >= 1000:
		return " (always first)"
	case adj > 0:
		return " (rather this one)"
	case adj < 0:
		return " (rather another)"
	}
	return ""
}

func (k *Kill) largestText() string {
	var parts []string
	width := 0
	for _, c := range k.Largest {
		part := fmt.Sprintf("%s %d (%s)", show(c.Comm, 16), c.PID, profile.FormatBytes(c.RSS))
		if width += len(part) + 2; width > maxShown {
			break
		}
		parts = append(parts, part)
	}
	return strings.Join(parts, ", ")
}

// meaning is what a person can conclude.
func (k *Kill) meaning() string {
	switch {
	case k.Manual:
		return "no memory was missing: look for who wrote f to /proc/sysrq-trigger, or pressed the keys"
	case k.Scope == System:
		return "no limit was met: the machine itself is too small or too full"
	case k.Scope == Nodes:
		return "a cpuset or a memory policy kept it off nodes that may have had memory"
	case k.Scope != Cgroup:
		return ""
	case k.LimitCgroup == "" || k.TaskCgroup == "" || k.LimitCgroup == k.TaskCgroup:
		return k.shareMeaning("the group's own limit was met")
	}
	above := "a limit above its own group was met"
	if k.Container.Pod != "" && !strings.Contains(k.LimitCgroup, k.Container.ID) {
		above = "the pod's limit was met, not the container's"
	}
	return k.shareMeaning(above)
}

// shareMeaning says whether the victim alone can be blamed.
func (k *Kill) shareMeaning(text string) string {
	if k.Anon == nil || k.Usage == nil || *k.Usage == 0 {
		return text
	}
	held := *k.Anon
	if k.Shmem != nil {
		held += *k.Shmem
	}
	percent := min(100, 100*float64(held)/float64(*k.Usage)) // the kernel takes the two figures one after the other
	text += fmt.Sprintf("; the victim held %.0f %% of it", percent)
	if percent < 50 {
		text += ", see its neighbours"
	}
	return text
}

func count(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}

func size(n *uint64) string { return profile.FormatBytes(*n) }

// show makes a foreign name fit to print, and shortens it in the middle: both ends of a path say most.
func show(s string, width int) string {
	r := []rune(profile.Sanitize(s))
	if len(r) <= width {
		return string(r)
	}
	half := (width - 3) / 2
	return string(r[:half]) + "..." + string(r[len(r)-half:])
}
