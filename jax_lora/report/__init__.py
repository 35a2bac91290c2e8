"""From the results of a run to files: JSON, TensorBoard events, plots, and a report to send.

This package knows nothing of LoRA's implementation. It takes a JSON-able dict, described in
`jax_lora.report.results`, imports nothing else of `jax_lora`, and needs matplotlib and tensorboardX
only inside the functions that draw or log.
"""

from jax_lora.report.charts import Line as Line
from jax_lora.report.charts import Matrix as Matrix
from jax_lora.report.charts import Panel as Panel
from jax_lora.report.charts import draw_matrices as draw_matrices
from jax_lora.report.charts import draw_panels as draw_panels
from jax_lora.report.json_file import write_json as write_json
from jax_lora.report.markdown import write_report as write_report
from jax_lora.report.plots import COLOURS as COLOURS
from jax_lora.report.plots import write_plots as write_plots
from jax_lora.report.results import PHASES as PHASES
from jax_lora.report.sweeps import write_sweep_plots as write_sweep_plots
from jax_lora.report.tensorboard import ACCURACY_TAG as ACCURACY_TAG
from jax_lora.report.tensorboard import LOSS_TAG as LOSS_TAG
from jax_lora.report.tensorboard import write_tensorboard as write_tensorboard
