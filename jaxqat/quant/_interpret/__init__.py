# pyright: strict
"""Runs a plan: the traced operations again, with codes in place of the planned tensors.

The evaluator goes through the program's operations in order. For each it computes the float result,
as the model wrote it, and beside it the integer form of the result, if it has one (`_forms`). Three
things differ from the float program:

- A layer of the plan multiplies codes (`layers`). Its float result has the straight-through
  gradient, and its form is the int32 accumulator.
- A tensor of the plan is quantized as soon as it is known: its form is rounded to its grid, and all
  its readers see the dequantized codes.
- Ranges depend on the mode (`states`): calibration only observes the float program, training uses
  each range one step late and moves it, and frozen ranges stay.

With frozen ranges, the codes are those of the deployed network, bit for bit.
"""

from jaxqat.quant._interpret.evaluator import Evaluator
from jaxqat.quant._interpret.layers import EvaluatedLayer
from jaxqat.quant._interpret.modes import Memory, Mode, Switches
from jaxqat.quant._interpret.segments import SegmentedEvaluator

__all__ = ["EvaluatedLayer", "Evaluator", "Memory", "Mode", "SegmentedEvaluator", "Switches"]
