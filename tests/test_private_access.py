"""Holds private and version-dependent parts of other packages in ``lightning_peft.compat``.

Three rules, each a function from a parsed module to what it uses: modules and names of other
packages that begin with an underscore, modules that change with each release, and private
attributes of their objects, which are listed since a text does not show whose they are.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOM = "lightning_peft/compat/"
PACKAGES = {
    "bitsandbytes", "datasets", "gradio", "gradio_client", "lightning", "lightning_fabric",
    "gguf", "openpyxl", "peft", "pytorch_lightning", "torch", "transformers",
}  # fmt: skip

# Modules without an underscore that no documentation describes, or whose content moves about.
UNSTABLE = {
    "bitsandbytes.utils",
    "datasets.arrow_writer",
    "datasets.utils",
    "gradio.context",
    "gradio.state_holder",
    "peft.tuners.lora.layer",
    "peft.tuners.tuners_utils",
    "peft.utils.other",
    "peft.utils.transformers_weight_conversion",
    "torch.multiprocessing.reductions",
    "transformers.conversion_mapping",
    "transformers.core_model_loading",
    "transformers.loss.loss_utils",
    "transformers.modeling_gguf_pytorch_utils",
    "transformers.modeling_layers",
    "transformers.quantizers.base",
}

# Private attributes, methods and arguments, and public ones that no documentation describes.
# Not here: ``_parameters``, ``_buffers`` and ``_modules`` of ``nn.Module``, which are annotated on
# the class, have been there in every release, and are how torch's own tutorials change modules; and
# hooks that subclasses should override, such as ``_save_to_state_dict``.
ATTRIBUTES = {
    "torch": """
        _are_functorch_transforms_active _autograd _backward_hooks _backward_pre_hooks _cdata
        _compiled_call_impl _conv_forward _current_level _forward_hooks _forward_pre_hooks
        _fused_rms_norm _local_scalar_dense _log_softmax _non_persistent_buffers_set _numel_cache
        _opt_called _optimizer_load_state_dict_post_hooks _optimizer_load_state_dict_pre_hooks
        _output_padding _reversed_padding_repeated_twice _schema _shutdown_workers _softmax _to_copy
        _unsafe_view _version _wrapped_by_lr_sched
    """,
    "transformers": """
        _attn_implementation _commit_hash _from_config _gradient_checkpointing_func
        _hf_peft_config_loaded _is_hf_initialized _is_quantized _keep_in_fp32_modules
        _keep_in_fp32_modules_strict _keys_to_ignore_on_load_unexpected _loss_function
        _model_mapping _name_or_path _raise_exceptions_for_connection_errors
        _raise_exceptions_for_gated_repo _raise_exceptions_for_missing_entries
        all_tied_weights_keys
    """,
    "peft": """
        _cast_adapter_dtype _check_target_module_compatiblity _create_new_module _custom_modules
        _disable_adapters _mark_only_adapters_as_trainable _replace_module
    """,
    "bitsandbytes": """
        bnb_quantized compute_type_is_set get_paged packing_format_for_cpu
        support_avx512bf16_for_cpu
    """,
    "lightning": """
        _MockOptimizer _TunerExitException _accelerator_connector _average_model
        _call_callback_hooks
        _call_lightning_module_hook _callback_metrics _checkpoint_io _class_path _combined_loader
        _combined_loader_states_to_load _compiler_ctx _computed _configure_launcher _data_fetcher
        _device _fabric _instantiator _last_global_step_saved _launcher
        _load_combined_loader_states _logger_connector _monitor_candidates
        _num_ready_batches_reached _parameters_to_prune _parser _restarting _results
        _run_subcommand _save_last_checkpoint _setup_model _should_accumulate
        _should_check_val_fx _should_reload_train_dl _start_method _trainer
    """,
    "gradio": "root_block state_holder",
    "openpyxl": "_get_source",
}
LISTED = {name for names in ATTRIBUTES.values() for name in names.split()}
# The page imports neither Lightning nor transformers: it has names of its own that are private ones
# of Lightning, and looks for a key of transformers' in configs of visitors.
LISTED_FOR_PAGE = LISTED - {*ATTRIBUTES["lightning"].split(), "_name_or_path"}


class Finder(ast.NodeVisitor):
    """Collects the uses of private parts in one module."""

    def __init__(self, listed: set[str] = LISTED) -> None:
        self.listed = listed
        self.imported: set[str] = set()
        self.found: list[tuple[int, str]] = []

    def add(self, node: ast.AST, what: str) -> None:
        self.found.append((getattr(node, "lineno", 0), what))

    def check_path(self, node: ast.AST, path: str) -> None:
        parts = path.split(".")
        if parts[0] in PACKAGES:
            unstable = any(path == name or path.startswith(f"{name}.") for name in UNSTABLE)
            if unstable or any(part.startswith("_") for part in parts):
                self.add(node, path)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self.check_path(node, alias.name)
            if alias.name.split(".")[0] in PACKAGES:
                self.imported.add(alias.asname or alias.name.split(".")[0])

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.level or (node.module or "").split(".")[0] not in PACKAGES:
            return
        for alias in node.names:
            self.check_path(node, f"{node.module}.{alias.name}")
            self.imported.add(alias.asname or alias.name)

    def visit_Call(self, node: ast.Call) -> None:
        called = ast.unparse(node.func).rpartition(".")[2]
        first = node.args[0] if node.args else None
        if called in ("import_module", "__import__") and isinstance(first, ast.Constant):
            self.check_path(node, str(first.value))
        for keyword in node.keywords:
            if keyword.arg in self.listed:
                self.add(keyword.value, f"{keyword.arg}=")
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        root: ast.expr = node
        while isinstance(root, ast.Attribute):
            root = root.value
        own = not (isinstance(root, ast.Name) and root.id in self.imported)
        private = node.attr.startswith("_") and not node.attr.startswith("__")
        event = node.attr == "_data" and ast.unparse(node.value) == "event"
        if node.attr in self.listed or event or (private and not own):
            self.add(node, ast.unparse(node))
        self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for part in node.body:
            if isinstance(part, ast.FunctionDef) and part.name in self.listed:
                self.add(part, f"def {part.name}")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if node.value in self.listed:
            self.add(node, repr(node.value))


def private_uses(text: str, listed: set[str] = LISTED) -> list[tuple[int, str]]:
    """Line and source of each use of something private, once, in order."""
    finder = Finder(listed)
    finder.visit(ast.parse(text))
    return sorted(set(finder.found))


def modules() -> Iterator[tuple[str, str]]:
    for package in ("lightning_peft", "gradio_app"):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            if not name.startswith(ROOM):
                yield name, path.read_text(encoding="utf-8")


def test_private_parts_of_other_packages_are_used_in_one_room() -> None:
    found = {
        name: private_uses(text, LISTED_FOR_PAGE if name.startswith("gradio_app/") else LISTED)
        for name, text in modules()
    }
    problems = [f"{name}:{line}: {use}" for name, uses in found.items() for line, use in uses]
    assert not problems, "move to lightning_peft/compat:\n" + "\n".join(problems)


def test_the_room_has_what_it_is_for() -> None:
    rooms = {path.stem for path in (ROOT / ROOM).glob("*.py")} - {"__init__"}
    assert {room.removesuffix("_distributed") for room in rooms} <= PACKAGES
    for room in rooms:
        assert private_uses((ROOT / ROOM / f"{room}.py").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("text", "use"),
    [
        ("import torch._C", "torch._C"),
        ("from torch.nn.modules.conv import _ConvNd", "torch.nn.modules.conv._ConvNd"),
        ("from torch.utils._pytree import tree_map", "torch.utils._pytree.tree_map"),
        ("import torch\nx = torch._C._get()", "torch._C._get"),
        ("from torch import nn as n\nn.Module._call(x)", "n.Module._call"),
        ("from transformers.quantizers.base import Q", "transformers.quantizers.base.Q"),
        ("m = import_module('gradio.state_holder')", "gradio.state_holder"),
        ("v = tensor._version", "tensor._version"),
        ("getattr(config, '_commit_hash', None)", "'_commit_hash'"),
        ("f(_raise_exceptions_for_gated_repo=False)", "_raise_exceptions_for_gated_repo="),
        ("class A(B):\n  def _replace_module(self): ...", "def _replace_module"),
        ("i = event._data['index']", "event._data"),
    ],
)
def test_a_use_is_found(text: str, use: str) -> None:
    assert use in [found for _, found in private_uses(text)]


@pytest.mark.parametrize(
    "text",
    [
        "import torch\nfrom torch import nn\nx = torch.zeros(1)\nnn.Linear(1, 1).weight.__class__",
        "from torch.utils.checkpoint import checkpoint",
        "self._own = module._parameters['weight']",
        "from lightning_peft.compat.torch import version_of\nx = '_data'",
    ],
)
def test_own_and_public_names_are_free(text: str) -> None:
    assert private_uses(text) == []
