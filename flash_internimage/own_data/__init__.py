"""Own datasets: conversion to the formats that training reads, checks, and configs."""
