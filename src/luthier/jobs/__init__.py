"""Queue, leases, events and workers: runs a workflow by name, in a process of its own."""
