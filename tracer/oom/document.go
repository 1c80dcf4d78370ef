package oom

import "time"

// Document is a kill as JSON: sizes in bytes, null for what the log does not tell.
type Document struct {
	Time          *time.Time  `json:"time"`
	UptimeSeconds float64     `json:"uptime_seconds,omitempty"`
	Scope         Scope       `json:"scope"`
	PID           int         `json:"pid"`
	Comm          string      `json:"comm"`
	UID           *int        `json:"uid"`
	TotalVM       *uint64     `json:"total_vm_bytes"`
	Anon          *uint64     `json:"anon_rss_bytes"`
	File          *uint64     `json:"file_rss_bytes"`
	Shmem         *uint64     `json:"shmem_rss_bytes"`
	PageTables    *uint64     `json:"page_tables_bytes"`
	Score         *int        `json:"score"`
	ScoreAdj      *int        `json:"oom_score_adj"`
	Group         bool        `json:"oom_group"`
	Asker         bool        `json:"allocating_task"`
	Manual        bool        `json:"manual"`
	Invoker       *invoker    `json:"invoker"`
	LimitCgroup   string      `json:"limit_cgroup"`
	TaskCgroup    string      `json:"task_cgroup"`
	Container     string      `json:"container"`
	Pod           string      `json:"pod"`
	Runtime       string      `json:"runtime"`
	Usage         *uint64     `json:"usage_bytes"`
	Limit         *uint64     `json:"limit_bytes"`
	SwapUsage     *uint64     `json:"swap_usage_bytes"`
	SwapLimit     *uint64     `json:"swap_limit_bytes"`
	SwapWithRAM   bool        `json:"swap_includes_memory"`
	Failures      *uint64     `json:"limit_hits"`
	Candidates    int         `json:"candidates"`
	Largest       []candidate `json:"largest"`
	Kernel        string      `json:"kernel"`
	Explanation   string      `json:"explanation"`
}

type invoker struct {
	PID   int    `json:"pid"`
	Comm  string `json:"comm"`
	GFP   string `json:"gfp"`
	Order int    `json:"order"`
}

type candidate struct {
	PID      int    `json:"pid"`
	Comm     string `json:"comm"`
	RSS      uint64 `json:"rss_bytes"`
	ScoreAdj int    `json:"oom_score_adj"`
}

// Document is the kill as JSON.
func (k *Kill) Document() Document {
	d := Document{
		UptimeSeconds: k.Uptime.Seconds(), Scope: k.Scope, PID: k.PID, Comm: k.Comm, UID: k.UID,
		TotalVM: k.TotalVM, Anon: k.Anon, File: k.File, Shmem: k.Shmem, PageTables: k.PageTables,
		Score: k.Score, ScoreAdj: k.ScoreAdj, Group: k.Group, Asker: k.Asker, Manual: k.Manual,
		LimitCgroup: k.LimitCgroup, TaskCgroup: k.TaskCgroup,
		Container: k.Container.ID, Pod: k.Container.Pod, Runtime: k.Container.Runtime,
		Usage: k.Usage, Limit: k.Limit, SwapUsage: k.SwapUsage, SwapLimit: k.SwapLimit, SwapWithRAM: k.SwapWithRAM,
		Failures: k.Failures, Candidates: k.Candidates, Largest: []candidate{}, Kernel: k.Kernel,
		Explanation: k.Headline(),
	}
	if meaning := k.meaning(); meaning != "" {
		d.Explanation += "; " + meaning
	}
	if !k.Time.IsZero() {
		utc := k.Time.UTC()
		d.Time = &utc
	}
	if k.Invoker.Comm != "" {
		d.Invoker = &invoker{k.Invoker.PID, k.Invoker.Comm, k.Invoker.GFP, k.Invoker.Order}
	}
	for _, c := range k.Largest {
		d.Largest = append(d.Largest, candidate(c))
	}
	return d
}
