from .data.images import ImageData as ImageData
from .data.preference import PreferenceData as PreferenceData
from .data.sequence_to_sequence import Seq2SeqData as Seq2SeqData
from .data.series import SeriesData as SeriesData
from .data.speech import SpeechData as SpeechData
from .data.supervised import SupervisedData as SupervisedData
from .data.text_classification import TextClassificationData as TextClassificationData
from .data.token_classification import TokenClassificationData as TokenClassificationData
from .data.unpaired import UnpairedPreferenceData as UnpairedPreferenceData
from .engine.adapters import disable_adapters as disable_adapters
from .engine.adapters import set_adapter as set_adapter
from .engine.files.adapter_files import save_adapter as save_adapter
from .engine.files.adapter_loading import load_adapter as load_adapter
from .engine.injection import inject as inject
from .engine.merging import merge as merge
from .engine.merging import unmerge as unmerge
from .engine.reporting import report as report
from .engine.unloading import unload as unload
from .engine.verification.verify import verify as verify
from .plan.prediction import plan_memory as plan_memory
from .plugin.callbacks import LoRACallback as LoRACallback
from .plugin.callbacks import QLoRACallback as QLoRACallback
from .plugin.loading import load_from_checkpoint as load_from_checkpoint
from .plugin.namespace import use_namespace as use_namespace
from .plugin.strategies import LoRAStrategy as LoRAStrategy
from .plugin.strategies import QLoRAStrategy as QLoRAStrategy

__version__: str
