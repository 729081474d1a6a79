"""The words that the project itself puts into prompts, for training and inference alike."""

# Design section 2: the middle branch of the single-edit guidance, and the Rec task.
RECONSTRUCTION_PROMPT = "Please reproduce this image."

# The empty user turn: the unconditional branch of guidance, and the Uncond task.
UNCONDITIONAL_PROMPT = ""

# What the VLM is asked for a new caption; the paper gives no wording.
DESCRIPTION_PROMPT = "Describe this image in detail."
