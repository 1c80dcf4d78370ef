package main

import (
	"io"

	"github.com/spf13/cobra"

	"github.com/allocsnoop/allocsnoop/profile"
)

func newDiffCommand() *cobra.Command {
	var (
		asJSON bool
		per    string
		output string
		top    int
	)
	cmd := &cobra.Command{
		Use:   "diff OLD NEW [--per allocations|seconds|COUNT|OLD,NEW] [-o FILE]",
		Short: "Compare two profiles: libraries that changed build, then functions that grew",
		Long: `Compare two profiles by the functions that hold memory, matched by name, so that two builds of one
library compare. Libraries in another build come first. A difference that chance, sampling or the
other load explains is not listed.

--per says what makes runs of other length or load comparable:
  allocations  how often the call paths of both runs were called (the default)
  seconds      the length of the runs
  5000         the units of work done, such as requests, the same in both; gives bytes per request
  5000,2500    the same, for OLD and for NEW`,
		Args: exactly(2, "profiles (OLD and NEW)"),
		RunE: func(cmd *cobra.Command, args []string) error {
			by, err := profile.ParsePer(per)
			if err != nil {
				return &exitError{exitUsage, err}
			}
			if top < 1 {
				return usageErrorf("--top %d: want at least 1", top)
			}
			defer collectRarely()()
			useHugePages(args)
			old, err := readProfile(args[0])
			if err != nil {
				return err
			}
			new, err := readProfile(args[1])
			if err != nil {
				return err
			}
			d := profile.Compare(old, new, by)
			if output != "" {
				err := writeOutput(output, func(w io.Writer) error {
					p, err := profile.EncodeDiff(old, new, d.Scale)
					if err != nil {
						return err
					}
					return p.Write(w)
				})
				if err != nil {
					return err
				}
			}
			width, color := terminal(cmd.OutOrStdout())
			opt := profile.DiffOptions{OldName: args[0], NewName: args[1], Width: width, Color: color, Top: top, Profile: output}
			if asJSON {
				return profile.WriteDiffJSON(cmd.OutOrStdout(), d, new, opt)
			}
			return profile.WriteDiff(cmd.OutOrStdout(), d, old, new, opt)
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print one JSON document")
	cmd.Flags().StringVar(&per, "per", "allocations", "what makes the runs comparable")
	cmd.Flags().StringVarP(&output, "output", "o", "", "also write the difference as a profile for go tool pprof")
	cmd.Flags().IntVar(&top, "top", 10, "functions to show")
	return cmd
}
