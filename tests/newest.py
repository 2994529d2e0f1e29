"Train, predict and save under the newest or lowest versions; run by `make test-newest` and `make test-lowest`."
import sys
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path

import torch

warnings.filterwarnings("ignore")
from fd_focus.all import Settings, load_focus, save_focus   # noqa: E402
from fd_focus.training.run import train   # noqa: E402

lowest, fastcore = "lowest" in sys.argv, int(version("fastcore").split(".")[0])
assert lowest or fastcore >= 2, "this environment does not hold fastcore 2"
assert not lowest or version("torch").startswith("2.6"), "this environment does not hold the lowest torch"
settings = Settings(arch="toy_resnet", image_size=64, images_per_class=8, n_classes=4, epochs=2, bs=8)
learn, table, summary = train(settings, bar=False)
assert torch.isfinite(torch.tensor(table.train_loss.tolist())).all()
with tempfile.TemporaryDirectory() as tmp:
    learn.export(Path(tmp) / "model.pkl")
    loaded = load_focus(save_focus(learn, Path(tmp) / "model"))
x = torch.rand(2, 3, 64, 64)
with torch.no_grad(): assert torch.allclose(loaded(x), learn.model.eval()(x), atol=1e-5)
print("fastai", version("fastai"), "fastcore", version("fastcore"), "torch", version("torch"), "fine")
