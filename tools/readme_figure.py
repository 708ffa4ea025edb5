"""Draw the README's figure from the recorded dry run of the full config: `python tools/readme_figure.py`."""

from glmpp import Checkpoint, DryRunReport
from glmpp.lab.figures import layers_and_stages
from glmpp.lab.notebook import DATA, GLM_CONFIG, RECORDED

report = DryRunReport.load(RECORDED / "pp8_installed.json", Checkpoint.from_config(GLM_CONFIG))
target = DATA / "figures" / "layers_and_stages.png"
target.parent.mkdir(exist_ok=True)
layers_and_stages([one.stage for one in report.stages], report).savefig(target)
