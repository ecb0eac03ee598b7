"""More than one GPU behind Cog's HTTP interface, on Ray Serve: one Cog server a GPU, and a front with a queue."""
