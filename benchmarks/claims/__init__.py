"""The paper's claims, measured: ``python -m benchmarks.claims --preset cpu``.

What is compared: `arms`, `grid`, `statements`; at which size: `presets`, `data`.  A run: `jobs`,
`measuring`, `inference` (`paths`, `fixed_points`); many of them: `running`, `processes`, `cost`,
`limits`.  What is kept: `results`, `versions`; what is shown: `statistics`, `tables`, `studies`,
`plots`, `page`.
"""
