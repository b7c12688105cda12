"""The paper's claims, measured: ``python -m benchmarks.claims --preset cpu``.

What is compared: `arms`, `grid`, `paper`, `statements`; at which size: `presets`, `data`.  A run:
`jobs`, `measuring`, `inference` (`paths`, `fixed_points`); many of them: `running`, `processes`,
`cost`, `limits`.  What is kept: `results`, `versions`, `former` (`bits`); what is shown:
`statistics`, `tables`, `studies`, `plots`, `page`.
"""
