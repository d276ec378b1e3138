"""Decide which requests our MLflow servers take: `authorization_function` of their accounts names `authenticate`.

MLflow itself takes requests from the page of any port of localhost, and serves more than tracking: an assistant that starts coding agents
and writes files, a gateway, webhooks and jobs. Whoever has the password may move aliases, and not run commands, so these are closed.
MLflow's charts ask for the models of a gateway, and show a refusal as an error: they get an empty list, as from MLflow without a gateway.
"""

from __future__ import annotations

import json
import re

from flask import Response, request
from mlflow.server.auth import authenticate_request_basic_auth
from werkzeug.datastructures import Authorization

CLOSED = re.compile(
    r"/gateway(/.*)?"
    r"|/(ajax-)?api/[0-9.]+/(mlflow/)?(assistant|gateway|gateway-proxy|jobs|prompt-optimization|webhooks)(/.*)?"
    r"|/(ajax-)?api/[0-9.]+/mlflow/(genai/evaluate|issues|scorer)/invoke",
    re.DOTALL,  # a line feed in a path is one more character of a name
)

MODELS_OF_GATEWAY = re.compile(r"/(ajax-)?api/2\.0/mlflow/gateway-proxy")


def authenticate() -> Authorization | Response:
    """Return the account of a request, or the response that ends it: 403 for a foreign page or a closed service, else 401."""
    host = request.headers.get("Host", "")
    if any(origin not in (f"http://{host}", f"https://{host}") for origin in request.headers.getlist("Origin")):
        return Response("refused: the request comes from a different page than MLflow's own\n", 403)
    found = authenticate_request_basic_auth()
    if not isinstance(found, Response) and request.method == "GET" and MODELS_OF_GATEWAY.fullmatch(request.path):
        return Response(json.dumps({"endpoints": []}), 200, content_type="application/json")
    if not isinstance(found, Response) and CLOSED.fullmatch(request.path):
        return Response(
            "refused: this server keeps runs and models; assistant, gateway, webhooks and jobs are off\n", 403
        )
    return found
