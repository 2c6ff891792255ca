"""A forward product as its kernels are told of it."""

from typing import Any, NamedTuple

from ..configs.config import Config, Target
from ..language.arguments import Matrix, Options, Vector
from ..launching import launch


class ForwardProblem(NamedTuple):
    """output = activation(input @ weight.mT + bias), without the tensors.

    batch, n, k: layers, out_features and in_features; rows.size is M.
    rows: input.
    weight, bias: (B, N, K) and (B, N).
    """

    batch: int
    n: int
    k: int
    rows: launch.Rows
    weight: Matrix
    bias: Vector | None
    output: launch.Operand
    options: Options
    target: Target

    def launch(
        self, config: Config, programs: int, *scalars: Any, without: int = 0
    ) -> launch.Launch:
        """That of a kernel of input, weight, bias, results, M, N, K, `zero` and `scalars`.

        without: how many pointers it takes after the results, and can do without here.
        """
        return launch.Launch(
            (programs,),
            (*[None] * without, self.rows.size, self.n, self.k, 0.0, *scalars),
            {"OPTIONS": self.options, "TILE": config.blocks} | config.compile_options(self.target),
            (self.rows.matrix, self.weight, self.bias),
        )
