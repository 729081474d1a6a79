"""Data sets as people have them, each format a `wemmu_jax.data.index.Format`."""
