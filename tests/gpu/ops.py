"""Every op of the CUDA backend against f64, then the decoder's engine on it: the test programs, and what they say."""
import os
import re

from processes import Failed, run_logged

PROGRAMS = ("cuda-tests", "cuda-engine-tests")
# As libtest and `Comparison` of kernels/tests/common say it. Tests run side by side, so that a line may begin with another test's name.
TEST = re.compile(r"^test (\S+) \.\.\. (ok|FAILED)$")
COMPARISON = re.compile(r"^(?:test \S+ \.\.\. )?(\w+).*: off by at most (\S+), (\d+) % of what is allowed$")


class Ops:
    """What has been said so far: tests, and for each op the worst that a comparison has found."""

    def __init__(self):
        self.passed, self.failed, self.worst = 0, [], {}

    def take(self, line):
        test, comparison = TEST.match(line.rstrip()), COMPARISON.match(line.rstrip())
        if test and test[2] == "ok":
            self.passed += 1
        elif test:
            self.failed.append(test[1])
        if comparison:
            op, error, share = comparison[1], float(comparison[2]), int(comparison[3]) / 100
            count, worst_error, worst_share = self.worst.get(op, (0, 0.0, 0.0))
            self.worst[op] = (count + 1, max(worst_error, error), max(worst_share, share))

    def result(self):
        worst = {op: {"comparisons": count, "error": error, "share": share} for op, (count, error, share) in sorted(self.worst.items())}
        return {"passed": self.passed, "failed": self.failed, "worst": worst}


def run(bench, log):
    ops, failures = Ops(), []
    for program in PROGRAMS:
        # With one thread libtest does not put a test and its outcome in one line.
        command = [bench.binary(program), "--ignored", "--nocapture", "--test-threads", str(min(max(os.cpu_count(), 2), 8))]
        try:
            run_logged(command, log, bench.left(), ops.take)
        except Failed as error:
            # The engine may be right where an op is not, or the other way round.
            failures.append(str(error))
        bench.partial["ops"] = ops.result()
    if failures or not ops.passed:
        raise Failed("; ".join([*failures, *ops.failed]) or "no test ran")
    return ops.result()


def lines(result):
    """For the table."""
    tests = [f"ops: {result['passed']} tests passed, {len(result['failed'])} failed"]
    return tests + [
        f"  {op:30} {row['comparisons']:4} comparisons, at most {row['error']:.1e} off, {row['share']:4.0%} of what is allowed"
        for op, row in result["worst"].items()
    ]
