"""Every op of the CUDA backend against f64, then the decoder's engine on it: the test programs, and what they say."""
import os
import re
import subprocess

from processes import Failed, run_logged

PROGRAMS = ("cuda-tests", "cuda-engine-tests")
# As libtest and `Comparison` of kernels/tests/common say it. Tests run side by side, so that a line may begin with another test's name.
TEST = re.compile(r"^test (\S+) \.\.\. (ok|FAILED)$")
COMPARISON = re.compile(r"^(?:test \S+ \.\.\. )?(\w+).*: off by at most (\S+), (\d+) % of what is allowed$")


class Ops:
    """What has been said so far: whether tests passed, together and alone, and for each op the worst that a comparison has found."""

    def __init__(self):
        self.together, self.alone, self.worst = {}, {}, {}

    def take(self, line, tests):
        test, comparison = TEST.match(line.rstrip()), COMPARISON.match(line.rstrip())
        if test:
            tests[test[1]] = test[2] == "ok"
        if comparison:
            op, error, share = comparison[1], float(comparison[2]), int(comparison[3]) / 100
            count, worst_error, worst_share = self.worst.get(op, (0, 0.0, 0.0))
            self.worst[op] = (count + 1, max(worst_error, error), max(worst_share, share))

    def failed(self):
        return [name for name, passed in self.together.items() if not passed]

    def result(self):
        worst = {op: {"comparisons": count, "error": error, "share": share} for op, (count, error, share) in sorted(self.worst.items())}
        failed = {name: {True: "passes alone", False: "fails alone", None: "not run alone"}[self.alone.get(name)] for name in self.failed()}
        return {"passed": len(self.together) - len(failed), "failed": failed, "worst": worst}


def names(program):
    """Of all tests."""
    listed = subprocess.run([program, "--ignored", "--list"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True, timeout=60)
    return [line.removesuffix(": test") for line in listed.stdout.splitlines() if line.endswith(": test")]


def run(bench, log):
    ops, failures, programs = Ops(), [], [bench.binary(program) for program in PROGRAMS]
    bench.partial["ops"] = ops.result()
    for index, program in enumerate(programs):
        # With one thread libtest does not put a test and its outcome in one line.
        command = [program, "--ignored", "--nocapture", "--test-threads", str(min(max(os.cpu_count(), 2), 8))]
        tests = names(program)
        ops.together |= dict.fromkeys(tests, False)
        try:
            # The engine may be right where an op is not, or the other way round; where one hangs, time must be left for the other.
            run_logged(command, log, bench.left() * (0.6 if index == 0 else 0.8), lambda line: ops.take(line, ops.together))
            # Its status says so, wherever another test's words stand between a name and its outcome.
            ops.together |= dict.fromkeys(tests, True)
        except Failed as error:
            failures.append(str(error))
        bench.partial["ops"] = ops.result()
    if not failures and ops.together:
        return ops.result()
    # A fault takes the card from every test of its process: which ones fail by themselves?
    for program in programs:
        for name in [name for name in names(program) if name in ops.failed()]:
            if bench.left() <= 2:
                break
            try:
                run_logged([program, "--ignored", "--nocapture", "--exact", name], log, bench.within(15), lambda line: ops.take(line, ops.alone))
            except Failed:
                ops.alone[name] = False
    bench.partial["ops"] = ops.result()
    raise Failed("; ".join([*failures, *(name for name in ops.failed() if not ops.alone.get(name))]) or "no test ran")


def lines(result):
    """For the table."""
    tests = [f"ops: {result['passed']} tests passed, {len(result['failed'])} failed"]
    tests += [f"  {name} failed, {alone}" for name, alone in result["failed"].items()]
    return tests + [
        f"  {op:30} {row['comparisons']:4} comparisons, at most {row['error']:.1e} off, {row['share']:4.0%} of what is allowed"
        for op, row in result["worst"].items()
    ]
