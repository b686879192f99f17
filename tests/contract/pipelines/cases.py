"""All pipeline classes that the contract test covers."""

from tests.contract.pipelines.audio import AUDIO
from tests.contract.pipelines.edits_more import MORE_EDITS
from tests.contract.pipelines.families import FAMILIES
from tests.contract.pipelines.images import IMAGES
from tests.contract.pipelines.later import LATER
from tests.contract.pipelines.transformers_2d import TRANSFORMERS_2D
from tests.contract.pipelines.unets import UNETS
from tests.contract.pipelines.videos import VIDEOS
from tests.contract.pipelines.videos_more import MORE_VIDEOS
from tests.contract.pipelines.videos_rest import VIDEOS_REST

CASES = [*FAMILIES, *TRANSFORMERS_2D, *IMAGES, *UNETS, *VIDEOS, *MORE_VIDEOS, *AUDIO, *LATER, *MORE_EDITS, *VIDEOS_REST]
