/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The few kernel structures that the programs read, each with only the fields they need. CO-RE finds the real offsets
 * at load, so the layout here means nothing. A struct stands before the first pointer to it: clang 14 otherwise writes
 * a forward declaration into BTF, which cannot be relocated ("type is unsized").
 *
 * Included after linux/bpf.h; not together with linux/ptrace.h, which knows only the compiling machine's registers.
 */
#ifndef ALLOCSNOOP_CORE_H
#define ALLOCSNOOP_CORE_H

/* User registers, with the names of the system's asm/ptrace.h, which bpf/bpf_tracing.h uses. They are fixed ABI. */
#if defined(__TARGET_ARCH_arm64)
struct user_pt_regs {
	__u64 regs[31];
	__u64 sp, pc, pstate;
};
struct pt_regs;
#define PARM6(ctx) (((struct user_pt_regs *)(ctx))->regs[5])
#else
struct pt_regs {
	unsigned long r15, r14, r13, r12, rbp, rbx, r11, r10, r9, r8, rax, rcx, rdx, rsi, rdi;
	unsigned long orig_rax, rip, cs, eflags, rsp, ss;
};
#define PARM6(ctx) ((ctx)->r9)
#endif

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

/* kernel/events/uprobes.c: the page for out-of-line instructions; its first slot is the uretprobe trampoline */
struct xol_area {
	unsigned long vaddr;
};

struct uprobes_state {
	struct xol_area *xol_area;
};

typedef struct {
	int counter;
} atomic_t;

struct rlimit {
	unsigned long rlim_cur;
};

/* state that the threads of a process share; live counts those that have not exited */
struct signal_struct {
	atomic_t live;
	struct rlimit rlim[16];
};

struct super_block {
	__u32 s_dev;
};

struct inode {
	unsigned long i_ino;
	struct super_block *i_sb;
};

struct file {
	struct inode *f_inode;
};

struct vm_area_struct {
	struct file *vm_file;
};

/* total_vm and data_vm are pages */
struct mm_struct {
	struct uprobes_state uprobes_state;
	unsigned long total_vm, data_vm, def_flags;
	int map_count;
};

/* one pending uretprobe: the return address it replaced and where on the stack that was */
struct return_instance {
	unsigned long stack;
	unsigned long orig_ret_vaddr;
	struct return_instance *next;
};

struct uprobe_task {
	struct return_instance *return_instances;
};

struct task_struct {
	int pid;
	int tgid;
	struct mm_struct *mm;
	struct uprobe_task *utask;
	void *stack;
	struct task_struct *group_leader;
	struct task_struct *real_parent;
	struct signal_struct *signal;
	int exit_code;
};

/* the kernel's own pt_regs, known here only for its size (on arm64 it is larger than what user space sees of it) */
struct pt_regs___kernel {
	int unused;
};

#pragma clang attribute pop

/* Helpers newer than the headers of Debian 12 are looked for by their value in the kernel's enum. */
enum bpf_func_id___kernel {
	BPF_FUNC_task_pt_regs___kernel = 175,
};

#endif
