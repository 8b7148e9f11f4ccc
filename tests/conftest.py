"""What the contract tests share, made once a session: models of five families, a task, and the stages on some of them."""
from types import SimpleNamespace

import beside
import datasets
import pytest
import tiny
import torch
from datasets import Dataset

from emloc.data import Task
from emloc.emulator import build_emulator
from emloc.finetune import lora_config, train_adapter, training_args
from emloc.model import default_model

# models this small run ten times slower when threads wait for each other
torch.set_num_threads(1)

FAMILIES = list(tiny.BUILD)
STAGED = ["llama", "gpt2", "phi3", "llama, quantized"]

def pytest_collection_modifyitems(items):
    "The test that waits for the notebooks comes last."
    items.sort(key=lambda item: item.name == beside.TEST)

@pytest.fixture(scope="session", autouse=True)
def sharing(request):
    "Where other tests run too, the stages' notebooks that share a cache run beside them from the beginning: the lessons come after the tests, when what both need is there."
    several = len({item.fspath for item in request.session.items}) > 1
    if several and any(item.name == beside.TEST for item in request.session.items):
        default_model() # so that no two processes fetch it
        yield beside.start(beside.sharers()[0])
    else: yield None
    beside.stop_all()

@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    "The datasets library keeps what it parsed in a folder of this session."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield

@pytest.fixture
def offline(monkeypatch):
    "No hub."
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)

@pytest.fixture(scope="session")
def tokenizer(): return tiny.tokenizer()

@pytest.fixture(scope="session")
def task() -> Task:
    "36 training, 4 validation and 8 test rows with the labels animal, plant and tool."
    rows = Dataset.from_list(tiny.rows()).shuffle(seed=0)
    part = lambda a, b: rows.select(range(a, b))
    return Task("kinds", part(0, 36), part(36, 40), part(40, 48), list(tiny.KINDS))

@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict:
    "{family: model directory}, float32."
    folder = tmp_path_factory.mktemp("models")
    return {family: tiny.save_model(family, folder / family) for family in FAMILIES}

@pytest.fixture(scope="session")
def other_model(tmp_path_factory):
    "A Llama of the same shapes with other weights."
    return tiny.save_model("llama", tmp_path_factory.mktemp("other") / "llama", seed=7)

@pytest.fixture(params=FAMILIES)
def family(request) -> str: return request.param

@pytest.fixture
def model(models, family): return models[family]

@pytest.fixture(scope="session")
def llama(models): return models["llama"]

@pytest.fixture(scope="session")
def make_stages(models, task, tmp_path_factory):
    "Function (family, perhaps with a form) -> model, emulator and raw adapter directories, built at first use."
    made = {}
    def make(family):
        if family not in made:
            folder = tmp_path_factory.mktemp(f"stages-{family}")
            kind, form = (*family.split(", "), "lowrank")[:2]
            emulator = build_emulator(models[kind], task.calibration(), folder / "emulator", form=form, ratio=0.5 if form == "lowrank" else 0.15)
            raw = train_adapter(emulator, task.train, folder / "raw", lora=lora_config(rank=4, alpha=8),
                                args=training_args(folder / "checkpoints", steps=6, lr=1e-2, bf16=False))
            made[family] = SimpleNamespace(family=family, model=models[kind], emulator=emulator, raw=raw)
        return made[family]
    return make

@pytest.fixture(params=STAGED)
def stages(request, make_stages): return make_stages(request.param)

@pytest.fixture(scope="session")
def llama_stages(make_stages): return make_stages("llama")

@pytest.fixture(scope="session")
def site(tmp_path_factory) -> SimpleNamespace:
    "The documentation, built once from a copy of the notebooks with a probe among the lessons: folder, root, report."
    from docs_tree import copy_tree
    from emloc.site import build_site
    root, folder = copy_tree(tmp_path_factory.mktemp("docs-tree")), tmp_path_factory.mktemp("docs") / "site"
    return SimpleNamespace(root=root, folder=folder, report=build_site(folder, root))
