// Package exact holds the tests of exactness: programs that keep a ledger of their own, and the profiles of allocsnoop,
// which must say the same to the byte, under each allocator that people run.
//
// The trap: a mismatch in a total hides what went wrong. So every call site has its own function, number and size, and
// its row is compared on its own, once by the true caller of the allocator function and once over all stacks through it,
// which also finds blocks that were booked twice.
package exact
