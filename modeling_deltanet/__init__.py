"""DeltaNet for Transformers: importing this package makes `model_type: deltanet` known to the Auto classes."""

from .versions_deltanet import check_transformers  # noqa: F401  (first: another release may lack what follows)


# isort: split
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .cache_deltanet import load_cache, restore_cache, save_cache, snapshot_cache
from .configuration_deltanet import DeltaNetConfig
from .modeling_deltanet import (
    DeltaNetForCausalLM,
    DeltaNetForSequenceClassification,
    DeltaNetForTokenClassification,
    DeltaNetModel,
    DeltaNetPreTrainedModel,
)
from .prompt_lookup import prompt_lookup


__version__ = "0.1.0"

_AUTO_CLASSES = {
    AutoModel: DeltaNetModel,
    AutoModelForCausalLM: DeltaNetForCausalLM,
    AutoModelForSequenceClassification: DeltaNetForSequenceClassification,
    AutoModelForTokenClassification: DeltaNetForTokenClassification,
}

AutoConfig.register(DeltaNetConfig.model_type, DeltaNetConfig)
for auto_class, model_class in _AUTO_CLASSES.items():
    auto_class.register(DeltaNetConfig, model_class)


def register_remote_code() -> None:
    """Make every later `save_pretrained` write the code beside the weights.

    Such a folder loads with `trust_remote_code=True` where this package is not installed. The mark stays for the life
    of the process (it is Transformers' `register_for_auto_class` on each class).
    """
    DeltaNetConfig.register_for_auto_class()
    for auto_class, model_class in _AUTO_CLASSES.items():
        model_class.register_for_auto_class(auto_class.__name__)


__all__ = [
    "__version__",
    "DeltaNetConfig",
    "DeltaNetForCausalLM",
    "DeltaNetForSequenceClassification",
    "DeltaNetForTokenClassification",
    "DeltaNetModel",
    "DeltaNetPreTrainedModel",
    "load_cache",
    "prompt_lookup",
    "register_remote_code",
    "restore_cache",
    "save_cache",
    "snapshot_cache",
]
