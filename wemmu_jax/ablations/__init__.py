"""The paper's ablations on miniworld: what is trained, graded and compared, and the tables that come of it."""
