from tests.orchestration import finished, finished_template, prefect_url, template, workspace

__all__ = ["finished", "finished_template", "prefect_url", "template", "workspace"]
