"""Competitions of the stand-in: data files, submissions with their scores, limits, both leaderboards."""

from __future__ import annotations

import csv
import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from stand_in.common import NOW, ApiError, Clock, Habits, Redirect, page_of


@dataclass
class SubmissionState:
    ref: int
    file_name: str
    description: str
    data: bytes
    polls_left: int
    missing_left: int = 0
    public: float | None = None
    private: float | None = None
    error: str = ""
    made: float = 0.0

    def public_view(self) -> dict:
        done = self.polls_left <= 0
        view = {
            "ref": self.ref,
            "fileName": self.file_name,
            "date": NOW,
            "description": self.description,
            "totalBytes": len(self.data),
            "status": "PENDING",
            "publicScore": "",
            "privateScore": "",
        }
        if done and self.error:
            view |= {"status": "ERROR", "errorDescription": self.error}
        elif done:
            view |= {
                "status": "COMPLETE",
                "publicScore": "" if self.public is None else f"{self.public:.5f}",
                "privateScore": "" if self.private is None else f"{self.private:.5f}",
            }
        return view


@dataclass
class Competition:
    files: dict[str, bytes] = field(default_factory=dict)
    rules_accepted: bool = True
    daily_limit: int = 5
    total_limit: int | None = None
    score: Callable[[bytes], float | None] = lambda data: 0.5
    score_after: int = 1
    missing_after: int = 0
    others: dict[str, float] = field(default_factory=dict)
    private_board: dict[str, float] = field(default_factory=dict)  # open once it is not empty
    zip_files: set[str] = field(default_factory=set)
    submissions: list[SubmissionState] = field(default_factory=list)


def metric_score(kernel, solution: dict[int, list[float]]) -> Callable[[bytes], float]:
    """The competition's metric, of the kernel module: `solution` maps caption ids to image vectors."""
    import numpy as np

    def score(data: bytes) -> float:
        csv.field_size_limit(1 << 30)
        rows = list(csv.DictReader(io.StringIO(data.decode())))
        ids = [int(row["id"]) for row in rows]
        if set(ids) != set(solution):
            raise ValueError("Submission must contain the ids of the test set")
        predictions = np.array([json.loads(row["embedding"]) for row in rows], np.float32)
        gallery = np.array([solution[i] for i in ids], np.float32)
        return float(kernel.retrieval_metrics(predictions, gallery)["mrr"])

    return score


class CompetitionCalls:
    """The RPC methods of competitions; `StandIn` has the state."""

    user: str
    habits: Habits
    clock: Clock
    competitions: dict[str, Competition]

    def _competition(self, body: dict, rules: bool = False) -> Competition:
        slug = body.get("competitionName", "")
        if slug not in self.competitions:
            raise ApiError(404, f"Competition not found: {slug}")
        competition = self.competitions[slug]
        if rules and not competition.rules_accepted:
            raise ApiError(403, "You must accept this competition's rules before you can continue")
        return competition

    def rpc_DownloadDataFile(self, body: dict) -> Redirect:
        competition, name = self._competition(body, rules=True), body.get("fileName", "")
        if name not in competition.files:
            raise ApiError(404, f"File not found: {name}")
        data = competition.files[name]
        if name in competition.zip_files:
            packed = io.BytesIO()
            with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr(Path(name).name, data)
            name, data = name + ".zip", packed.getvalue()
        return Redirect(self.sign("data", name, data))

    def rpc_DownloadDataFiles(self, body: dict) -> Redirect:
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            for name, data in self._competition(body, rules=True).files.items():
                archive.writestr(name, data)
        return Redirect(self.sign("data", f"{body['competitionName']}.zip", packed.getvalue()))

    def rpc_StartSubmissionUpload(self, body: dict) -> dict:
        self._competition(body, rules=True)
        return self.start_upload(body["fileName"], body.get("contentLength", 0))

    def rpc_CreateSubmission(self, body: dict) -> dict:
        name, data = self.take_blob(body.get("blobFileTokens", ""))
        return self._create_submission(body, name, data)

    def rpc_CreateCodeSubmission(self, body: dict) -> dict:
        run = self.run_of(body["kernelOwner"], body["kernelSlug"], f"v{body.get('kernelVersion', 0)}")
        if body.get("fileName") not in run.outputs:
            raise ApiError(400, "Submission not allowed: the notebook version has no such output file")
        return self._create_submission(body, body["fileName"], run.outputs[body["fileName"]])

    def _create_submission(self, body: dict, name: str, data: bytes) -> dict:
        competition = self._competition(body, rules=True)
        if self._allowed(competition) <= 0:
            raise ApiError(400, "You have used all of your daily submissions")
        description = body.get("submissionDescription", "")[: self.habits.description_limit]
        state = SubmissionState(
            1000 + self.next_number(),
            name,
            description,
            data,
            competition.score_after,
            competition.missing_after,
            made=self.clock.now(),
        )
        try:
            state.public = competition.score(data)
        except Exception as error:  # what the server tells about a csv that it cannot score
            state.error = str(error)
        competition.submissions.insert(0, state)
        return {"message": f"Successfully submitted to {body['competitionName']}", "ref": state.ref}

    def rpc_ListSubmissions(self, body: dict) -> dict:
        views = [
            state.public_view()
            for state in self._competition(body).submissions
            if state.missing_left <= 0 and self.clock.older(state.made, self.habits.history_lag)
        ]
        page, rest = page_of(views, body)
        return {"submissions": page} | rest

    def rpc_GetSubmission(self, body: dict) -> dict:
        for competition in self.competitions.values():
            for state in competition.submissions:
                if state.ref == body.get("ref"):
                    if state.missing_left > 0:
                        state.missing_left -= 1
                        break
                    state.polls_left -= 1
                    return state.public_view()
        raise ApiError(404, "Submission not found")

    @staticmethod
    def _allowed(competition: Competition) -> int:
        used = len(competition.submissions)
        total = used + 1000 if competition.total_limit is None else competition.total_limit
        return max(0, min(competition.daily_limit - used, total - used))

    def rpc_GetSubmissionLimits(self, body: dict) -> dict:
        competition = self._competition(body)
        counted = len(competition.submissions)
        by_total = competition.total_limit is not None and competition.total_limit < competition.daily_limit
        return {
            "numToday": counted,
            "numTotal": counted,
            "numAllowedNow": self._allowed(competition),
            "limitedByTotal": by_total,
        }

    def rpc_GetLeaderboard(self, body: dict) -> dict:
        competition = self._competition(body)
        own = [state.public for state in competition.submissions if state.public is not None and state.polls_left <= 0]
        teams = competition.others | ({self.user: max(own)} if own else {})
        if competition.private_board and not body.get("overridePublic"):
            teams = competition.private_board
        rows = [
            {"teamId": number, "teamName": team, "submissionDate": NOW, "score": f"{score:.5f}"}
            for number, (team, score) in enumerate(sorted(teams.items(), key=lambda item: -item[1]), 1)
        ]
        page, rest = page_of(rows, body)
        return {"submissions": page} | rest
