"""All pipeline classes that the contract test covers."""

from tests.contract.pipelines.families import FAMILIES
from tests.contract.pipelines.transformers_2d import TRANSFORMERS_2D
from tests.contract.pipelines.videos import VIDEOS

CASES = [*FAMILIES, *TRANSFORMERS_2D, *VIDEOS]
