"""A sample of the mutants of a cosmic-ray session, and the list of those that survived.

``python tests/mutation.py SESSION.sqlite sample 240 0`` marks all but 240 of the mutants that are
still to be run as skipped, chosen with the seed 0; ``… report`` prints the numbers and the
survivors.  How the two go together is told in tests/MUTATION.md.
"""

from __future__ import annotations

import random
import sqlite3
import sys

PENDING = """
    SELECT module_path, operator_name, operator_args, occurrence, job_id FROM mutation_specs
    WHERE job_id NOT IN (SELECT job_id FROM work_results) ORDER BY 1, 2, 3, 4
"""


def sample(session: sqlite3.Connection, size: int, seed: int) -> None:
    """Leave ``size`` mutants to be run; the choice depends on the code and the seed alone."""
    jobs = [job for *_, job in session.execute(PENDING)]
    chosen = set(random.Random(seed).sample(jobs, min(size, len(jobs))))
    skipped = [(job,) for job in jobs if job not in chosen]
    session.executemany(
        "INSERT INTO work_results (worker_outcome, job_id) VALUES ('SKIPPED', ?)", skipped
    )


def report(session: sqlite3.Connection) -> None:
    """Print how many mutants were killed and survived, and the lines of the survivors."""
    counts = """
        SELECT test_outcome, count(*) FROM work_results
        WHERE worker_outcome='NORMAL' GROUP BY 1
    """
    for outcome, count in session.execute(counts):
        print(outcome, count)
    survivors = """
        SELECT module_path, start_pos_row, operator_name, diff FROM mutation_specs
        JOIN work_results USING (job_id) WHERE test_outcome='SURVIVED' ORDER BY 1, 2, 3
    """
    for path, row, operator, diff in session.execute(survivors):
        print(f"{path}:{row} {operator}")
        print(*(line for line in diff.splitlines()[3:] if line[:1] in "+-"), sep="\n")


if __name__ == "__main__":
    with sqlite3.connect(sys.argv[1]) as connection:
        if sys.argv[2] == "sample":
            sample(connection, int(sys.argv[3]), int(sys.argv[4]))
        else:
            report(connection)
