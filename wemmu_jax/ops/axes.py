"""Names of the device mesh's axes; what lies along which is told in `sharding.rules`."""

ROWS = ("data", "fsdp")  # rows of a batch lie along both
TOKENS = "sequence"
HEADS = "tensor"
AXES = (*ROWS, TOKENS, HEADS)  # from the slowest links to the fastest
