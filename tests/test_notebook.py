"""The notebook runs from its first cell to its last."""

import nbclient
import nbformat
import pytest

import processes


@pytest.mark.process
@pytest.mark.long
def test_the_quick_start_runs(tmp_path, monkeypatch):
    for name, value in processes.environment().items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(processes.ROOT / "notebooks" / "quickstart.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", {}) for output in shown) == 3
    printed = "".join(output.get("text", "") for output in shown)
    assert "resume" not in printed
    assert "ship: " in printed
    assert "timm.create_model" in printed
    bars = [output for output in shown if "<progress" in output.get("data", {}).get("text/html", "")]
    assert len(bars) == 1  # one line that is updated, not a line every two seconds
    assert 'value="1320" max="1320"' in bars[0]["data"]["text/html"]
    predictions = next(cell for cell in notebook.cells if "top=2" in cell.source)
    assert "Prediction(label=" in predictions.outputs[-1]["data"]["text/plain"]
