"""What a stage costs on a pod before it is there: memory, FLOPs, collectives and a predicted step time."""
