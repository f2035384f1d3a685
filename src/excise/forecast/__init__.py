"""What a job will take before anything is loaded: memory, bytes read and time of every stage, by the config alone."""

from excise.forecast.outline import Advice, Outline
from excise.forecast.shape import Shape
from excise.forecast.speed import Speed, measured_speed
from excise.forecast.stages import Forecast, Stage, Work, forecast

__all__ = ["Advice", "Forecast", "Outline", "Shape", "Speed", "Stage", "Work", "forecast", "measured_speed"]
