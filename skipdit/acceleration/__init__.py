"""`pipe.compile()`: what makes a pipeline faster on its device, chosen, turned on, told, and undone.

Nothing here changes what is computed beyond rounding, except for float8 and another dtype, which are asked for by name.
"""

from .choice import CHOICES, Choice, compiler_for
from .mixin import CompileMixin
from .turning_on import Acceleration

__all__ = ["CHOICES", "Acceleration", "Choice", "CompileMixin", "compiler_for"]
