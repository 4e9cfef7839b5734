"""Task 5. Warm up, then decay.

The share of the peak rate at a step, counted from 0, of a run of max_steps. Over the first warmup_steps it rises along a
line that would be 0 one step before the first and is 1 at step warmup_steps. From there it falls along a line that would
be 0 at step max_steps, which is not made any more. Work the two lines out on paper.

    pytest exercises/05_learning_rate.py
"""

from nanochat.training import learning_rate_factor


def learning_rate(step: int, max_steps: int, warmup_steps: int) -> float:
    """→ the share of the peak rate, above 0 and at most 1."""
    raise NotImplementedError("two straight lines that meet at step warmup_steps, where both are 1")


def test_learning_rate():
    run = [learning_rate(step, 10, 4) for step in range(10)]
    assert run[0] > 0, "a first step at rate 0 learns nothing: the line was 0 one step before"
    assert run[4] == 1, f"step 4, the first after the warm-up, has the peak rate, not {run[4]}"
    assert run[9] > 0, "the last step made is step 9: the line reaches 0 at step 10"
    for max_steps, warmup_steps in ((10, 4), (5, 0), (784, 20), (3, 3)):
        for step in range(max_steps):
            ours, theirs = learning_rate(step, max_steps, warmup_steps), learning_rate_factor(step, max_steps, warmup_steps)
            assert abs(ours - theirs) < 1e-12, f"step {step} of {max_steps}, warm-up {warmup_steps}: {ours}, should be {theirs}"
