// Package budget tests on live processes what the tracer does when it may not go on as it did: the live map is full, or the
// trace costs more than its budget.
package budget
